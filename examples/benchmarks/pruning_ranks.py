"""What pruning does to ranks: first-order scores beside magnitudes, on MiniLM and SST-2.

    PYTHONPATH=examples python examples/benchmarks/pruning_ranks.py [--data DIR] [--keep 0.25 0.1] [--seeds 3]
        [--steps 32] [--smoke]

MiniLM is fine-tuned for `steps` batches of 16 sentences while its encoder is pruned to the fraction `keep`; the ranks
of its 36 matrices are taken before anything is factorized. Writes results/pruning_ranks.json run by run, and goes on
where it was stopped; draws results/pruning_ranks.png from it. `--smoke` takes a tiny random model, and leaves nothing.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import logging, set_seed

from benchmarks import made_up
from benchmarks.runs import mean_and_range, opened, save_figure, write
from benchmarks.tasks import DATA, INSIDE, Classification, train
from hf_lowrank import evaluation, rank_profile
from hf_lowrank.training import FirstOrderPruningCallback


RESULTS = Path(__file__).parent / "results"
SCORES = ("magnitude", "movement", "taylor")
NONE = "none"
ENERGY, RATE, BATCH = 0.9, 1e-4, 16
# Shares, of the full rank or of all rows, columns or entries.
MEASURES = {
    "rank": "numerical rank",
    "energy_rank": f"rank of {ENERGY:.0%} of the energy",
    "zero_rows": "rows without a weight",
    "zero_columns": "columns without a weight",
}


def measured(model):
    """The means over all matrices, as shares."""
    profile = rank_profile(model, ENERGY, INSIDE)
    sizes = {"zero_rows": "out_features", "zero_columns": "in_features"}
    empty = {
        name: sum(getattr(row, name) / getattr(row, size) for row in profile.rows) / len(profile.rows)
        for name, size in sizes.items()
    }
    return {name: profile.mean(name) for name in ("rank", "energy_rank", "nonzero")} | empty


def one_run(task, score, keep, seed, steps, folder):
    """Fine-tune and prune one model."""
    set_seed(seed)
    model, started = task.dense(), time.perf_counter()
    pruning = [] if score == NONE else [FirstOrderPruningCallback(score, keep, target_modules=INSIDE)]
    train(task, model, RATE, seed, steps, folder, callbacks=pruning)
    return {**measured(model), "accuracy": task.score(model), "seconds": round(time.perf_counter() - started, 1)}


def measure(task, path, keeps, seeds, steps):
    """Fill in the runs that `path` lacks."""
    facts = {"task": task.name, "steps": steps, "batch": task.batch, "energy": ENERGY, "rate": RATE}
    found = opened(path, facts, metric=task.metric)
    kinds = [(NONE, 1.0), *((score, keep) for keep in keeps for score in SCORES)]
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            for score, keep in kinds:
                runs = found["runs"].setdefault(f"{score} {keep:g}", {})
                if str(seed) in runs:
                    continue
                run = runs[str(seed)] = one_run(task, score, keep, seed, steps, scratch)
                found["environment"] = evaluation.environment()
                write(path, found)
                print(
                    f"{score} {keep:g} seed {seed}: " + ", ".join(f"{k} {v:.3g}" for k, v in run.items()), flush=True
                )
    return found


def draw(found, path):
    """One panel a measure, one group of bars a fraction, one bar a score; lines are the range over the seeds."""
    from matplotlib.figure import Figure

    def values(kind, measure):
        return [run[measure] for run in found["runs"][kind].values()]

    keeps = sorted({float(kind.split()[1]) for kind in found["runs"]} - {1.0}, reverse=True)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for shift, score in enumerate(SCORES):
            for place, keep in enumerate(keeps):
                mean, below, above = mean_and_range(values(f"{score} {keep:g}", measure))
                where, label = place + 0.27 * (shift - 1), score if place == 0 else None
                axes.bar(where, mean, 0.25, color=f"C{shift}", label=label, yerr=[[below], [above]])
        untouched = values(f"{NONE} 1", measure)
        axes.axhline(sum(untouched) / len(untouched), color="black", linestyle=":", label="not pruned")
        axes.set_xticks(range(len(keeps)), [f"{keep:.0%} kept" for keep in keeps])
        axes.set_ylim(0, 1.05 if measure.endswith("rank") else None)
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("share")
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(f"Pruned MiniLM on {found['task']}, {len(untouched)} seed(s)", fontsize=10)
    save_figure(figure, path)


def main():
    """Measure what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if asked.smoke:
            where, data, results = made_up.encoder(f"{folder}/model"), made_up.sentiment(folder), Path(folder)
        else:
            where, data, results = None, asked.data, RESULTS
        task = Classification("sst2", data, BATCH, where)
        # Accuracy is not what is measured here; a part of the sentences says whether a model is ruined.
        task.validation = task.validation[::4]
        found = measure(task, results / "pruning_ranks.json", asked.keep, asked.seeds, asked.steps)
        draw(found, results / "pruning_ranks.png")
        print(f"drawn: {(results / 'pruning_ranks.png').stat().st_size} bytes")


if __name__ == "__main__":
    main()
