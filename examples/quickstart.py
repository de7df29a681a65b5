"""Factorize a real language model while it loads, and see what it costs and what it saves.

    python examples/quickstart.py [--param-ratio 0.9] [--method kfac_svd] [--eval-text FILE] [--smoke]

No data set is needed: calibration text is sampled from the model itself, and quality is measured on English prose that
comes with Python, unless you name a text file.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.metrics import PeakMemory, perplexity
from benchmarks.setups import english, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank import Calibration, LowRankConfig, summary


def size_on_disk(folder):
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def generate(model, tokenizer, prompt):
    """A greedy continuation of `prompt`."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", " ")


def main():
    """Run the whole path and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--param-ratio", type=float, default=0.9, help="fraction of the linears' parameters kept")
    parser.add_argument("--method", default="kfac_svd", help="how factors are computed")
    parser.add_argument("--eval-text", help="text file to measure perplexity on")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()

    where, name = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(where)
    text = Path(arguments.eval_text).read_text(encoding="utf-8") if arguments.eval_text else english()
    windows = 1 if arguments.smoke else 8
    ids = tokenizer(text[: windows * 8192], return_tensors="pt")["input_ids"][0]
    sizes = {"samples": 4, "length": 64} if arguments.smoke else {}

    rows = [("", "parameters", "MiB on disk", "perplexity", "seconds", "peak MiB")]

    def step(label, folder, load):
        started = time.perf_counter()
        with PeakMemory() as memory:
            model = load()
            with torch.no_grad():
                logits = model(input_ids=ids[None, :64]).logits
        seconds = time.perf_counter() - started
        if not os.path.isdir(folder):
            model.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        quality = perplexity(model, ids, window=512, windows=windows)
        rows.append(
            (
                label,
                f"{parameters / 1e6:.1f}M",
                f"{size_on_disk(folder) / 2**20:.0f}",
                f"{quality:.2f}",
                f"{seconds:.0f}",
                f"{memory.peak / 2**20:.0f}",
            )
        )
        return model, logits

    with tempfile.TemporaryDirectory() as folder:
        load = AutoModelForCausalLM.from_pretrained
        step("dense", f"{folder}/dense", lambda: load(where, dtype=torch.float32))
        config = LowRankConfig(
            method=arguments.method, param_ratio=arguments.param_ratio, calibration=Calibration(**sizes)
        )
        model, logits = step(
            "factorized while loading",
            f"{folder}/small",
            lambda: load(where, lowrank_config=config, dtype=torch.float32),
        )
        report = summary(model)
        del model
        model, reloaded = step("saved and reloaded", f"{folder}/small", lambda: load(f"{folder}/small"))
        same = torch.equal(reloaded, logits)
        sentence = generate(model, tokenizer, "The capital of France is")

    print(f"\n{name}: {report.line}\n")
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    for line in rows:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))
    print(f"\nlogits after reloading equal, bit for bit: {same}")
    print(f"it says: {sentence}")
    if not same:
        raise SystemExit("the reloaded model differs from the one that was saved")


if __name__ == "__main__":
    main()
