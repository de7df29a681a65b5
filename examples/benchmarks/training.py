"""Compression while training, at equal sizes and equal steps: MiniLM on three tasks of GLUE.

    PYTHONPATH=examples python examples/benchmarks/training.py [--data DIR] [--tasks sst2 mrpc rte]
        [--ratios 0.5 0.25 0.16] [--methods svd fwsvd lpaf "lpaf, movement" trp maestro] [--seeds 3] [--steps N]
        [--smoke] [--estimate] [--readme]

A dense model is fine-tuned once a task, and kept in the cache. From it every method gets `steps` further batches of 16
sentences or 8 pairs, in an order that the seed gives, and ends with the same fraction of the linear parameters of the
encoder: `svd` and `fwsvd` factorize at once and recover with all of the steps; the others change the weights for half
of them first. `lpaf` prunes by Taylor scores, which tell in few steps what a weight is worth, `lpaf, movement` by the
score of the paper, which adds up over many. Everything else trains too. The training sets are subsampled: a run sees
what its batches hold. Writes results/training/<task>-<ratio>.json after every run, goes on where it was stopped, and
draws results/training/accuracy.png. `--estimate` times a few steps a task and says how long all of it takes;
`--readme` runs nothing and writes the table between `<!-- training -->` and `<!-- /training -->` of README.md;
`--smoke` takes a tiny random model, and leaves nothing.
"""

import argparse
import json
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
from transformers import AutoModelForSequenceClassification, logging, set_seed

from benchmarks import made_up, setups
from benchmarks.runs import cells, mean_and_range, opened, save_figure, write
from benchmarks.table import ROOT, into_readme
from benchmarks.tasks import DATA, GLUE, INSIDE, Classification, train
from hf_lowrank import LowRankConfig, MixedRankConfig, evaluation, factorize, training
from hf_lowrank.training import (
    FirstOrderPruningCallback,
    MixedRankCallback,
    MixedRankTrainer,
    TrainedRankPruningCallback,
)


RESULTS = Path(__file__).parent / "results" / "training"
BATCH, DENSE_RATE, RATE = 16, 1e-4, 1e-4
# Longer sentences make longer steps: so that a run, with the validation after it, is one or two minutes on one core.
STEPS = {"sst2": 128, "mrpc": 128, "rte": 96}
DENSE_STEPS = {"sst2": 480, "mrpc": 800, "rte": 480}
FISHER_ROWS = 128
# One size for every weight, so that methods differ in nothing but the factors.
SIZES = {"target_modules": INSIDE, "rank_multiple": 1, "allocation": "uniform"}


class Run:
    """One method from one dense model.

    Args:
        task ([`Classification`]): the data.
        ratio (`float`): parameters to keep of the linears inside.
        seed (`int`): of the order of the data, and of everything random.
        steps (`int`): batches in all.
        folder (`str`): for what has to be written.
    """

    def __init__(self, task, ratio, seed, steps, folder):
        self.task, self.ratio, self.seed, self.steps, self.folder = task, ratio, seed, steps, folder

    def train(self, model, steps, part=0, **how):
        """Train for `steps` batches; the second `part` of a run sees others than the first."""
        return train(self.task, model, RATE, 2 * self.seed + part, steps, self.folder, **how)

    def halves(self):
        """The batches before and after the weights become factors."""
        return self.steps // 2, self.steps - self.steps // 2


def by_svd(run, model):
    """Truncated SVD, then recovery."""
    factorize(model, LowRankConfig(method="svd", param_ratio=run.ratio, **SIZES))
    run.train(model, run.steps)
    return model


def by_fwsvd(run, model):
    """SVD weighed by the Fisher information of labelled sentences, then recovery."""
    batches = run.task.batches(FISHER_ROWS, BATCH, labels=True)
    factorize(model, LowRankConfig(method="fwsvd", param_ratio=run.ratio, **SIZES), calibration=batches)
    run.train(model, run.steps)
    return model


def by_lpaf(run, model, score="taylor"):
    """Pruning to as many weights as the factors will have numbers, sparsity-aware SVD, mixed-rank recovery."""
    first, second = run.halves()
    pruning = FirstOrderPruningCallback(score, run.ratio, keep_scores=True, target_modules=INSIDE)
    run.train(model, first, callbacks=[pruning])
    importance = f"{run.folder}/importance.safetensors"
    pruning.statistics(model).save(importance)
    config = MixedRankConfig(param_ratio=run.ratio, method="lpaf", statistics=importance, **SIZES)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        # As in the other methods, the rest of the model recovers with the factors.
        if not name.endswith("base_layer.weight"):
            parameter.requires_grad_(True)
    run.train(model, second, part=1, kind=MixedRankTrainer, callbacks=[MixedRankCallback(seed=run.seed)])
    return model.merge_and_unload()


def by_trp(run, model):
    """Projection to the ranks of the budget four times while training, then recovery of the factors."""
    first, second = run.halves()
    trp = TrainedRankPruningCallback(param_ratio=run.ratio, period=max(1, first // 4), target_modules=INSIDE)
    run.train(model, first, callbacks=[trp])
    run.train(model, second, part=1)
    return model


def by_maestro(run, model):
    """Ordered dropout over the ranks, the ranks of the budget cut out of it, then recovery."""
    first, second = run.halves()
    maestro = training.MaestroCallback(target_modules=INSIDE, final_prune=False, threshold=0, seed=run.seed)
    run.train(model, first, kind=training.MaestroTrainer, callbacks=[maestro])
    training.keep_leading(model, training.maestro_ranks(model, run.ratio))
    run.train(model, second, part=1)
    return model


METHODS = {
    "svd": by_svd,
    "fwsvd": by_fwsvd,
    "lpaf": by_lpaf,
    "lpaf, movement": partial(by_lpaf, score="movement"),
    "trp": by_trp,
    "maestro": by_maestro,
}


def fine_tuned(task, steps, cache, folder):
    """`(make the dense model, its accuracy)`, fine-tuned once and kept in `cache`, which is complete or absent."""
    kept = cache / f"{task.name}-{steps}"
    if not kept.is_dir():
        set_seed(0)
        model = task.dense()
        train(task, model, DENSE_RATE, 0, steps, folder)
        unfinished = cache / f"{kept.name}.partial"
        model.save_pretrained(unfinished)
        (unfinished / "score.json").write_text(json.dumps(task.score(model)))
        os.replace(unfinished, kept)
    make = partial(AutoModelForSequenceClassification.from_pretrained, kept)
    return make, json.loads((kept / "score.json").read_text())


def parameters(model):
    """Numbers in the weights of the linears inside, factorized or not."""
    inside = [module for name, module in model.named_modules() if re.fullmatch(INSIDE, name)]
    return sum(p.numel() for module in inside for name, p in module.named_parameters() if name.endswith("weight"))


def measure(task, ratio, methods, seeds, steps, dense_steps, results, cache):
    """Fill in the runs that `<task>-<ratio>.json` lacks."""
    path = results / f"{task.name}-{ratio:g}.json"
    facts = {
        "task": task.name,
        "ratio": ratio,
        "steps": steps,
        "dense_steps": dense_steps,
        "batch": task.batch,
    }
    found = opened(path, facts, metric=task.metric)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for method in methods:
                if str(seed) in found["runs"].get(method, {}):
                    continue
                make, score = fine_tuned(task, dense_steps, cache, folder)
                found["runs"]["dense"] = {"0": {"score": score}}
                set_seed(seed)
                started = time.perf_counter()
                model = METHODS[method](Run(task, ratio, seed, steps, folder), make())
                run = {"score": task.score(model), "parameters": parameters(model)}
                run["seconds"] = round(time.perf_counter() - started, 1)
                found["runs"].setdefault(method, {})[str(seed)] = run
                found["environment"] = evaluation.environment()
                write(path, found)
                print(f"{task.name} {ratio:g} {method} {seed}: {run}", flush=True)


def estimate(task, steps, dense_steps, folder):
    """Seconds of a run that trains dense weights, and of the fine-tuning in front of all, from a few batches."""
    model = task.dense()
    seconds = []
    for count in (1, 4):
        started = time.perf_counter()
        train(task, model, RATE, 0, count, folder)
        seconds.append(time.perf_counter() - started)
    step = (seconds[1] - seconds[0]) / 3
    started, some = time.perf_counter(), task.validation
    task.validation = some[:64]
    task.score(model)
    validation = (time.perf_counter() - started) * len(some) / 64
    task.validation = some
    return steps * step + validation, dense_steps * step + validation


def results_of(folder):
    """The result files, by task and from the largest model to the smallest."""
    found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return sorted(found, key=lambda result: (list(GLUE).index(result["task"]), -result["ratio"]))


def table(folder=RESULTS):
    """Markdown: mean and deviation over seeds, and the paired difference from FWSVD with its 95 % interval."""
    lines = ["| task | kept | method | seeds | parameters | mean | deviation | minus FWSVD |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|")
    shown = set()
    for found in results_of(folder):
        baseline = found["runs"].get("fwsvd", {})
        for name, runs in found["runs"].items():
            seeds, mean, deviation, difference = cells(runs, baseline)
            # The same dense model stands in front of several sizes.
            if name == "dense" and (found["task"], mean) in shown:
                continue
            shown.add((found["task"], mean))
            size = next(iter(runs.values())).get("parameters", "")
            kept = "1" if name == "dense" else f"{found['ratio']:g}"
            lines.append(
                f"| {found['task']} ({found['metric']}) | {kept} | {name} | {seeds} | {size} | {mean} | {deviation} "
                f"| {'' if name == 'dense' else difference} |"
            )
    return "\n".join(lines) + "\n"


def draw(folder, path):
    """Accuracy over kept parameters, one panel a task; lines join means, bars are the range over the seeds."""
    from matplotlib.figure import Figure

    results = results_of(folder)
    tasks = list(dict.fromkeys(found["task"] for found in results))
    figure = Figure(figsize=(4 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [found for found in results if found["task"] == task]
        for index, method in enumerate(METHODS):
            runs = {
                found["ratio"]: [run["score"] for run in found["runs"][method].values()]
                for found in of_task
                if method in found["runs"]
            }
            if not runs:
                continue
            means, below, above = zip(*map(mean_and_range, runs.values()), strict=True)
            axes.errorbar(list(runs), means, yerr=[below, above], label=method, color=f"C{index}", marker="o")
        scores = [run["score"] for run in of_task[0]["runs"]["dense"].values()]
        axes.axhline(sum(scores) / len(scores), color="black", linestyle=":", label="dense")
        axes.set(title=task, xlabel="linear parameters kept", xscale="log")
        axes.set_xticks(
            [found["ratio"] for found in of_task], [f"{found['ratio']:g}" for found in of_task], minor=False
        )
        axes.minorticks_off()
    panels[0].set_ylabel("accuracy")
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside right center", fontsize=8)
    save_figure(figure, path)


def main():
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--tasks", nargs="+", default=list(GLUE), choices=list(GLUE))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.16])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="batches of a run; four times as many of the dense model")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    if asked.readme:
        path = ROOT / "README.md"
        path.write_text(into_readme(path.read_text(encoding="utf-8"), table(), "training"), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        data, where, results, cache = asked.data, None, RESULTS, setups.CACHE / "training"
        if asked.smoke:
            where, data = made_up.encoder(f"{folder}/model"), made_up.sentiment(folder)
            results, cache, asked.tasks = Path(folder) / "results", Path(folder) / "cache", ["sst2"]
        total = 0.0
        for name in asked.tasks:
            task, steps = Classification(name, data, BATCH, where), asked.steps or STEPS[name]
            dense_steps = 4 * asked.steps if asked.steps else DENSE_STEPS[name]
            if asked.estimate:
                run, first = estimate(task, steps, dense_steps, folder)
                total += first + asked.seeds * len(asked.ratios) * len(asked.methods) * run
                print(f"{name}: {steps} steps, {run:.0f} s a run, {first:.0f} s the dense model")
                continue
            for ratio in asked.ratios:
                measure(task, ratio, asked.methods, asked.seeds, steps, dense_steps, results, cache)
        if asked.estimate:
            print(f"{total / 3600:.1f} hours for all of it; `lpaf` makes two passes a batch in its second half")
            return
        draw(results, results / "accuracy.png")
        print(table(results), end="")


if __name__ == "__main__":
    main()
