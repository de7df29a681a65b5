"""The results of `quality.py` as a Markdown table.

    PYTHONPATH=examples python examples/benchmarks/table.py [--readme]

`--readme` writes it between `<!-- results -->` and `<!-- /results -->` of README.md.
"""

import argparse
import json
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "quality"
DENSE = "dense"
COMMAND = "PYTHONPATH=examples python examples/benchmarks/quality.py"


def read(folder=RESULTS):
    """The results, largest model first; refuses results that do not compare."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    for result in results[1:]:
        if protocol(result) != protocol(results[0]):
            raise SystemExit(
                f"{result['variant']} and {results[0]['variant']} were measured on different models, texts, windows "
                f"or items; measure one of them again: {COMMAND} --again --variants NAME"
            )
    return sorted(results, key=lambda result: (-result["evaluation"]["size"]["bytes"], result["variant"]))


def protocol(result):
    """What two results must have in common to stand in one table."""
    evaluation = result["evaluation"]
    texts = {name: (text["windows"], text["window"], text["bos"]) for name, text in evaluation["perplexity"].items()}
    tasks = {name: (task["items"], task["metric"]) for name, task in evaluation["multiple_choice"].items()}
    return result["base"], texts, tasks, evaluation["data"]


def render(results):
    """Lines of Markdown."""
    if not results:
        return f"Not measured yet: `{COMMAND}`.\n"
    first = results[0]["evaluation"]
    texts, tasks = list(first["perplexity"]), list(first["multiple_choice"])
    head = ["", "MiB", "MiB of linears", *texts, *tasks, "mean", "seconds"]
    dense = next((r["evaluation"]["perplexity"] for r in results if r["variant"] == DENSE), None)
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for result in results:
        evaluation = result["evaluation"]
        sizes = (evaluation["size"]["bytes"], evaluation["size"]["linear_bytes"])
        accuracies = [evaluation["multiple_choice"][name] for name in tasks]
        lines.append(
            [
                f"`{result['variant']}`",
                *(f"{size / 2**20:.1f}" for size in sizes),
                *(cell(evaluation["perplexity"][name], dense and dense[name]) for name in texts),
                *(f"{accuracy[accuracy['metric']]:.3f}" for accuracy in accuracies),
                f"{evaluation['mean_accuracy']:.3f}" if accuracies else "",
                f"{sum(seconds for step, seconds in result['seconds'].items() if step != 'load'):.0f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{caption(results[0])}\n\n{table}\n"


def cell(text, dense):
    """The perplexity of a text, two decimals where they mean something, and how many times that of `dense` it is."""
    perplexity = text["perplexity"]
    if perplexity >= 1000:
        return f"{perplexity:.1e}"
    if dense is None or dense is text:
        return f"{perplexity:.2f}"
    return f"{perplexity:.2f} ({perplexity / dense['perplexity']:.3f}x)"


def caption(result):
    """One line that says what the columns are."""
    evaluation = result["evaluation"]
    texts, tasks = evaluation["perplexity"].values(), evaluation["multiple_choice"]
    windows = {f"{text['windows']} x {text['window']}" for text in texts}
    sizes = {
        "window": max(text["window"] for text in texts),
        "windows": max(text["windows"] for text in texts),
        "limit": max((task["items"] for task in tasks.values()), default=0),
    }
    command = " ".join([COMMAND, *(f"--{name} {size}" for name, size in sizes.items())])
    parts = [
        f"{result['base']} stored in bfloat16 or less, measured in float32, by `{command}`: perplexity over "
        f"{' and '.join(sorted(windows))} tokens"
    ]
    if tasks:
        metrics = ", ".join(f"{name} {task['metric']}" for name, task in tasks.items())
        items = sorted({task["items"] for task in tasks.values()})
        errors = [task[f"{task['metric']}_stderr"] or 0.0 for task in tasks.values()]
        counts = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
        parts.append(
            f"zero-shot accuracy over {counts} items a task ({metrics}; one standard error up to {max(errors):.3f})"
        )
    return (
        "; ".join(parts) + ". What a row is made of is in `quality_variants.json`. "
        "Bytes as stored, scales included. Seconds of one run, of calibration (sampling included), "
        "factorization, refinement and quantization, on cores that did other work too: an upper bound."
    )


def into_readme(text, block, name="results"):
    """`text` with `block` between the markers of `name`."""
    before, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
    return f"{before}{begin}\n{block}{end}{after}"


def main():
    """Print the table, or put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the block in README.md")
    arguments = parser.parse_args()
    block = render(read())
    if not arguments.readme:
        print(block, end="")
        return
    path = ROOT / "README.md"
    path.write_text(into_readme(path.read_text(encoding="utf-8"), block), encoding="utf-8")


if __name__ == "__main__":
    main()
