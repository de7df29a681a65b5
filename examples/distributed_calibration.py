"""Calibrate in several processes at once, then factorize in one.

    accelerate launch --num_processes 2 examples/distributed_calibration.py OUTPUT [--model MODEL]
        [--calibration self] [--samples 48] [--length 256] [--param-ratio 0.8] [--smoke]

Without GPUs, `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2` in place of `accelerate launch --num_processes 2`.
Every process holds the whole model and runs, or samples, its own part of the text; their sums are added, so that all
have the statistics of all of it. The first process writes `statistics.safetensors` and the factorized model to OUTPUT.
"""

import argparse
import os
import time
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from accelerate import Accelerator
from benchmarks.setups import smollm2, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig


def main():
    """Collect together, save once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the statistics and of the factorized model")
    parser.add_argument("--model", help="a folder or a repository; SmolLM2-135M-Instruct by default")
    parser.add_argument("--calibration", default="self", help="a .txt or .jsonl file, a data set id, or self")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--param-ratio", type=float, default=0.8)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    asked = parser.parse_args()
    accelerator = Accelerator()
    asked.output.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        where = asked.model or (tiny(asked.output / "tiny") if asked.smoke else smollm2()[0])
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(where, device_map={"": accelerator.device})
    data = Calibration(asked.calibration, samples=asked.samples, length=asked.length)
    started = time.perf_counter()
    statistics = hf_lowrank.collect_statistics(model, data, tokenizer, accelerator=accelerator)
    if accelerator.is_main_process:
        tokens, processes = statistics.provenance["tokens"], statistics.provenance["processes"]
        print(f"{tokens} tokens in {processes} processes: {time.perf_counter() - started:.0f} s")
        path = asked.output / "statistics.safetensors"
        statistics.save(path)
        hf_lowrank.factorize(model, LowRankConfig(param_ratio=asked.param_ratio), calibration=str(path))
        print(hf_lowrank.summary(model).line)
        model.save_pretrained(asked.output / "factorized")
        tokenizer.save_pretrained(asked.output / "factorized")
    accelerator.end_training()


if __name__ == "__main__":
    main()
