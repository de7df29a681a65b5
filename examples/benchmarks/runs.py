"""Result files that are filled run by run, and what runs under the same seeds say of each other."""

import json
import math
import os
import statistics

from scipy import stats

from hf_lowrank.files import writing


def opened(path, facts, **more):
    """The results in `path`, or `{**facts, **more, "runs": {}}`; refuses results of other `facts`."""
    found = json.loads(path.read_text()) if path.exists() else {**facts, **more, "runs": {}}
    other = {key: found.get(key) for key, value in facts.items() if found.get(key) != value}
    if other:
        raise SystemExit(f"{path} was measured otherwise ({other}); remove it to measure again.")
    return found


def write(path, found):
    """Replace a result file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, path)


def save_figure(figure, path, dpi=150):
    """Replace a PNG file in one go; the same figure gives the same bytes with the same matplotlib."""
    with writing(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png", metadata={"Software": None})


def compared(runs, baseline):
    """`(mean difference, half width of its 95 % interval)` over the seeds both have; `None` with fewer than two."""
    both = sorted(runs.keys() & baseline.keys())
    if len(both) < 2:
        return None
    differences = [runs[seed]["score"] - baseline[seed]["score"] for seed in both]
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(stats.t.ppf(0.975, len(differences) - 1)) * spread


def mean_and_range(values):
    """`(mean, how far the least is below it, how far the largest is above it)`, none of them negative."""
    mean = statistics.mean(values)
    # The mean of equal numbers can be one unit in the last place off.
    return mean, max(0.0, mean - min(values)), max(0.0, max(values) - mean)


def cells(runs, baseline):
    """`(seeds, mean, deviation, difference from the baseline)` as a table shows them."""
    scores = [run["score"] for run in runs.values()]
    deviation = f"{statistics.stdev(scores):.3g}" if len(scores) > 1 else ""
    difference = None if runs is baseline else compared(runs, baseline)
    said = ""
    if difference is not None:
        mean, half = difference
        said = f"{mean:+.3g} ± {half:.2g}" + (" (no difference shown)" if abs(mean) <= half else "")
    return str(len(scores)), f"{statistics.mean(scores):.4g}", deviation, said
