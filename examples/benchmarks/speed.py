"""How long calibration and factorization take, as ratios within one run.

    PYTHONPATH=examples python examples/benchmarks/speed.py

Prints the statistics passes of `whitened_svd` (forward only) and `kfac_svd` (forward and backward) over a plain
forward pass on the same tokens, and the seconds that factorizing all matrices of SmolLM2-135M takes, allocation
included. Writes results/speed.json.
"""

import os
import statistics
import time


os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import metrics, setups
from hf_lowrank import Calibration, LowRankConfig, collect_statistics, factorize


SAMPLES, LENGTH, BATCH, REPEATS = 48, 256, Calibration().batch_size, 1
METHODS = ("whitened_svd", "kfac_svd")


def timed(function):
    """`(seconds, result)` of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main():
    """Measure and write."""
    torch.set_num_threads(2)
    where, name = setups.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = tokenizer(setups.english(), return_tensors="pt")["input_ids"][0, : SAMPLES * LENGTH].view(SAMPLES, LENGTH)
    batches = [{"input_ids": block} for block in ids.split(BATCH)]
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)

    def forward():
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    forward()
    ratios, plain_seconds, collected = {method: [] for method in METHODS}, [], {}
    for _ in range(REPEATS):
        plain, _ = timed(forward)
        plain_seconds.append(plain)
        for method in METHODS:
            collected.pop(method, None)
            seconds, collected[method] = timed(lambda method=method: collect_statistics(model, batches, method=method))
            ratios[method].append(seconds / plain)
    result = {"model": name, "tokens": SAMPLES * LENGTH, "forward_seconds": statistics.median(plain_seconds)}
    for method in METHODS:
        result[f"{method}_statistics_over_forward"] = statistics.median(ratios[method])
        dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        config = LowRankConfig(method=method, param_ratio=0.8)
        given = collected.pop(method)
        seconds, _ = timed(lambda dense=dense, config=config, given=given: factorize(dense, config, calibration=given))
        result[f"{method}_factorize_seconds"] = seconds
    for key, value in result.items():
        print(f"{key:<40} {value if not isinstance(value, float) else round(value, 2)}")
    metrics.write("speed", result)


if __name__ == "__main__":
    main()
