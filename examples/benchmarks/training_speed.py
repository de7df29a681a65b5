"""What makes training of factorized models faster: resting factors, ranks that kernels like, merged layers.

    PYTHONPATH=examples python examples/benchmarks/training_speed.py [--tiny]

A step is forward, backward and AdamW, over all linears of SmolLM2-135M's blocks. `freezing`: two factors of half the
parameters, both trained, and one of them at rest; `SequentialFreezingCallback` alternates the two. `rounding`: ranks
of the same ratio as they come, as multiples of 8, and at the foot of the highest step of measured latency. `merging`:
eight factorized layers in a row with nothing between, and what `merge_linear` makes of them. Everything is a ratio
within one run. Writes results/training_speed.json; `--tiny` runs a random two-layer model and writes nothing.
"""

import argparse
import copy
import os
import statistics
import time


os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import metrics, setups
from hf_lowrank import LowRankConfig, LowRankLinear, factorize, merge_linear, summary
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


REPEATS, SAMPLES, LENGTH, RATIO = 7, 4, 128, 0.5
ROUNDINGS = {
    "as they come": (1, {"name": "uniform"}),
    "multiples of 8": (8, {"name": "uniform"}),
    "by latency": (8, {"name": "uniform", "rounding": "latency"}),
}


class Step:
    """A model with an optimizer, and a step of training on `inputs`."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model.train(), inputs
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self):
        made = self.model(**self.inputs)
        (made.loss if hasattr(made, "loss") else made.square().mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def factors(dense, rank_multiple, allocation, rows):
    """A copy of `dense` with two factors a weight where that is smaller or faster, which alone are trained."""
    if "rounding" in allocation:
        allocation = {**allocation, "rows": rows}
    config = LowRankConfig(
        method="svd", format="low_rank", param_ratio=RATIO, rank_multiple=rank_multiple, allocation=allocation
    )
    model = factorize(copy.deepcopy(dense), config).requires_grad_(False)
    for site in match_sites(dense):
        model.get_submodule(site.name).requires_grad_(True)
    return model


def layers(model):
    """The factorized layers."""
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def chain(width, count=8):
    """Factorized layers in a row."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))
    return factorize(model, LowRankConfig(method="svd", param_ratio=RATIO))


def medians(steps):
    """Median seconds of each of `steps`, by name."""
    seconds = {label: [] for label in steps}
    for repeat in range(REPEATS + 1):
        # In turn, so that whatever else the machine does hits all alike; the first round only warms up.
        for label, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat:
                seconds[label].append(time.perf_counter() - started)
    return {label: statistics.median(values) for label, values in seconds.items()}


def freezing(dense, inputs):
    """Steps with one factor at rest, over steps with both trained."""
    model = factors(dense, 8, {"name": "uniform"}, inputs["input_ids"].numel())
    steps = {"both trained": Step(model, inputs)}
    for side in ("left", "right"):
        resting = copy.deepcopy(model)
        for layer in layers(resting):
            getattr(layer, side).weight.requires_grad_(False)
        steps[f"{side} rests"] = Step(resting, inputs)
    seconds = medians(steps)
    ratios = {label: value / seconds["both trained"] for label, value in seconds.items()}
    return {**ratios, "turns": (ratios["left rests"] + ratios["right rests"]) / 2}


def rounding(dense, inputs):
    """Steps at rounded ranks over steps at ranks as they come; and the parameters kept."""
    rows = inputs["input_ids"].numel()
    models = {label: factors(dense, multiple, how, rows) for label, (multiple, how) in ROUNDINGS.items()}
    seconds = medians({label: Step(model, inputs) for label, model in models.items()})
    numbers = {label: sum(p.numel() for p in model.parameters() if p.requires_grad) for label, model in models.items()}
    base = "as they come"
    return {
        label: {
            "step": seconds[label] / seconds[base],
            "parameters": numbers[label] / numbers[base],
            "ranks": sorted({row.rank for row in summary(model).rows}),
        }
        for label, model in models.items()
    }


def merging(width, rows):
    """A step of the merged layers over one of the layers in a row; and the parameters kept."""
    apart = chain(width)
    merged = copy.deepcopy(apart)
    inputs = {"input": torch.randn(rows, width)}
    pairs = merge_linear(merged, inputs)
    seconds = medians({"apart": Step(apart, inputs), "merged": Step(merged, inputs)})
    sizes = [sum(p.numel() for p in model.parameters()) for model in (merged, apart)]
    return {"pairs": pairs, "step": seconds["merged"] / seconds["apart"], "parameters": sizes[0] / sizes[1]}


def main():
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1 if tiny else int(os.environ["OMP_NUM_THREADS"]))
    if tiny:
        dense, inputs = tiny_model("llama")
        name, ids = "a random tiny Llama", inputs()["input_ids"]
    else:
        where, name = setups.smollm2()
        text = AutoTokenizer.from_pretrained(where)(setups.english(), return_tensors="pt")
        ids = text["input_ids"][0, : SAMPLES * LENGTH].view(SAMPLES, LENGTH)
        dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    inputs = {"input_ids": ids, "labels": ids}
    result = {
        "model": name,
        "tokens": ids.numel(),
        "param_ratio": RATIO,
        "freezing": freezing(dense, inputs),
        "rounding": rounding(dense, inputs),
        "merging": merging(dense.config.hidden_size, ids.numel()),
    }
    for key in ("freezing", "rounding", "merging"):
        print(key)
        for label, value in result[key].items():
            value = value if isinstance(value, dict) else {"": value}
            numbers = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            print(f"  {label:<16} {numbers}")
    if not tiny:
        metrics.write("training_speed", result)


if __name__ == "__main__":
    main()
