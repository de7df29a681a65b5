"""Time and memory over the length of a sequence: full attention, factorized linears, Linformer, and both.

    PYTHONPATH=examples python examples/benchmarks/sequence_length.py [--lengths 128 256 512 1024 2048] [--smoke]

Greenformers advises low-rank linears up to 512 tokens and Linformer above; here both are measured, a forward pass and
a training step (forward, backward, AdamW), in float32, of encoders of the same sizes that are random but for their
shapes, with the attention that PyTorch chooses by default (`sdpa`) and with the one that keeps its matrix (`eager`).
Seconds are medians, peaks are of resident memory above what is there before a step; each variant and length runs in a
process of its own, and a run that was killed goes on where it was. Everything is printed as a ratio to full attention
of the same length. Writes results/sequence_length.json and .png; `--smoke` runs tiny sizes and writes nothing.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks import metrics, runs
from hf_lowrank import LinformerConfig, LinformerForMaskedLM, LowRankConfig, factorize
from hf_lowrank.integrations.streaming import release_freed_memory


RESULTS = Path(__file__).parent / "results"
# Forward passes over a batch of as many tokens, whatever their length, so that the linears cost the same.
TOKENS, REPEATS, RATIO, PROJECTED = 2048, 3, 0.5, 128
SIZES = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES["intermediate_size"] = 1024
LENGTHS = [128, 256, 512, 1024, 2048]
# By name: whether keys and values are projected, and whether linears are factorized.
VARIANTS = {
    "full": (False, False), "low rank": (False, True), "linformer": (True, False), "linformer, low rank": (True, True)
}  # fmt: skip
ATTENTIONS = ("sdpa", "eager")
MEASURES = ("forward_seconds", "step_seconds", "forward_bytes", "step_bytes")


def build(variant, length, attention, smoke):
    """An encoder with a head for masked tokens."""
    projects, factorizes = VARIANTS[variant]
    sizes = {**SIZES, "max_position_embeddings": length, "attn_implementation": attention}
    if smoke:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    if projects:
        config = LinformerConfig(**sizes, projected_length=min(PROJECTED, length // 2))
        model = LinformerForMaskedLM(config)
    else:
        model = BertForMaskedLM(BertConfig(**sizes))
    if factorizes:
        factorize(model, LowRankConfig(method="random", param_ratio=RATIO, calibration=None))
    return model


def measure(variant, length, attention, smoke):
    """Seconds and peak bytes of a forward pass and of a training step, in this process."""
    model = build(variant, length, attention, smoke)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, SIZES["vocab_size"], (max(1, TOKENS // length), length))

    def forward():
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)

    def step():
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {}
    for name, run in (("forward", forward), ("step", step)):
        run()
        # What the warm-up has freed would be taken again unseen.
        release_freed_memory()
        with metrics.PeakMemory("RssAnon") as memory:
            run()
        seconds = []
        for _ in range(1 if smoke else REPEATS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        found |= {f"{name}_seconds": statistics.median(seconds), f"{name}_bytes": memory.peak}
    return found


def measured_apart(*what):
    """What [`measure`] finds in a process of its own, whose memory nothing else has touched."""
    # Forked: it has everything imported, and no thread has run yet.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, *what).result()


def ratios(found):
    """`{attention: {variant: {length: {measure: ratio to full attention}}}}` of what has been measured."""
    table = {}
    for key, values in found["runs"].items():
        attention, variant, length = key.split("/")
        full = found["runs"].get(f"{attention}/full/{length}")
        if full is not None:
            row = {name: values[name] / full[name] if full[name] else None for name in MEASURES}
            table.setdefault(attention, {}).setdefault(variant, {})[length] = row
    return table


def show(table):
    """Print the ratios."""
    for attention, variants in table.items():
        print(f"\n{attention}: ratios to full attention (forward, step: time; forward, step: memory)")
        for variant, lengths in variants.items():
            for length, row in lengths.items():
                cells = "  ".join("   -" if row[name] is None else f"{row[name]:5.2f}" for name in MEASURES)
                print(f"  {variant:<20} {length:>6}  {cells}")


def draw(found, path):
    """Seconds and bytes of a step over the length, a line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, len(ATTENTIONS), sharex=True)
    for column, attention in enumerate(ATTENTIONS):
        for row, (measure, unit, label) in enumerate(
            (("step_seconds", 1, "seconds a step"), ("step_bytes", 2**20, "peak MiB of a step"))
        ):
            axis = axes[row][column]
            for variant in VARIANTS:
                points = [
                    (int(key.rpartition("/")[2]), values[measure] / unit)
                    for key, values in found["runs"].items()
                    if key.startswith(f"{attention}/{variant}/")
                ]
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=variant)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            axis.set_title(attention)
    axes[1][0].set_xlabel(f"tokens a sequence, {TOKENS} a batch")
    axes[0][0].legend(frameon=False)
    runs.save_figure(figure, path, dpi=110)


def main():
    """Measure what is missing, print ratios, write numbers and a figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    facts = {
        "sizes": SIZES, "tokens": TOKENS, "param_ratio": RATIO, "projected_length": PROJECTED, "seed": 0,
        "threads": torch.get_num_threads(), "command": "examples/benchmarks/sequence_length.py",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sequence_length.json" if asked.smoke else RESULTS / "sequence_length.json"
        found = runs.opened(path, facts, environment=metrics.evaluation.environment())
        for length in [16] if asked.smoke else asked.lengths:
            for attention in ATTENTIONS:
                for variant in VARIANTS:
                    key = f"{attention}/{variant}/{length}"
                    if key not in found["runs"]:
                        found["runs"][key] = measured_apart(variant, length, attention, asked.smoke)
                        runs.write(path, found)
        show(ratios(found))
        draw(found, path.with_suffix(".png"))
        if not asked.smoke:
            print(f"\nwrote {path.name} and {path.stem}.png")


if __name__ == "__main__":
    main()
