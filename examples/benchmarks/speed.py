"""How long calibration and factorization take, as ratios within one run.

    python examples/benchmarks/speed.py

Prints the statistics pass over a plain forward pass over the same tokens, and the seconds that factorizing all
matrices of SmolLM2-135M takes. Writes results/speed.json.
"""

import os
import statistics
import time


os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import metrics, setups
from hf_lowrank import LowRankConfig, collect_statistics, factorize


SAMPLES, LENGTH, BATCH, REPEATS = 24, 512, 8, 3


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
    pairs = []
    for _ in range(REPEATS):
        plain, _ = timed(forward)
        collecting, collected = timed(lambda: collect_statistics(model, batches))
        pairs.append((plain, collecting))
    seconds, _ = timed(lambda: factorize(model, LowRankConfig(param_ratio=0.8), calibration=collected))
    result = {
        "model": name,
        "tokens": SAMPLES * LENGTH,
        "forward_seconds": statistics.median(plain for plain, _ in pairs),
        "statistics_seconds": statistics.median(collecting for _, collecting in pairs),
        "statistics_over_forward": statistics.median(collecting / plain for plain, collecting in pairs),
        "factorize_seconds": seconds,
        "matrices": 210,
    }
    for key, value in result.items():
        print(f"{key:<26} {value if not isinstance(value, float) else round(value, 2)}")
    metrics.write("speed", result)


if __name__ == "__main__":
    main()
