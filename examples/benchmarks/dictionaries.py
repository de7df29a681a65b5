"""Two factors against dictionaries of equal size, on real matrices and on a whole model.

    PYTHONPATH=examples python examples/benchmarks/dictionaries.py --data DIR [--end-to-end] [--ratios 0.8 0.6]
        [--variants svd whitened_svd compot ksvd mod] [--sweeps 8] [--accounting mask] [--smoke]

Matrices are the queries, values and second MLP matrices of an early, a middle and a late layer of SmolLM2-135M. The
Grams of 96 x 256 tokens of `calib_wikipedia/train.jsonl` are what methods see; the error is that of the outputs on
96 x 256 tokens of `validation.jsonl`,

    sqrt(tr((W - W') C (W - W')^T) / tr(W C W^T)),

of factors in float64, and of what bfloat16 makes of them. Every variant stores at most `ratio` of the numbers of the
weight, masks counted in words of two bytes; `--accounting effective` counts none for dictionaries, as the paper does.
K-SVD and MOD make 8 sweeps, which is few: the paper makes 60. Seconds are those of the clock.

`--end-to-end` factorizes every linear of the blocks at the first ratio, all to the same ratio each, and measures
perplexity on `wikitext2`, in bfloat16, with seconds of factorizing: two factors by SVD and by SVD-LLM, the same in
format `pivoted`, whose ranks are higher at equal numbers, and COMPOT. K-SVD would take hours.

Writes results/dictionaries.json after every number and goes on where it was stopped; `--smoke` runs a tiny random
model and leaves nothing.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import runs, setups
from benchmarks.adapters import DATA
from benchmarks.metrics import perplexity
from benchmarks.quality import texts, timed
from hf_lowrank import FORMATS, METHODS, Calibration, LowRankConfig, collect_statistics, evaluation, factorize, summary
from hf_lowrank.provenance import command


RESULTS = Path(__file__).parent / "results" / "dictionaries.json"
LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
VARIANTS = ("svd", "whitened_svd", "compot", "ksvd", "mod")
MODELS = {
    "svd": {"method": "svd"},
    "whitened_svd": {"method": "whitened_svd"},
    "whitened_svd, pivoted": {"method": "whitened_svd", "format": "pivoted"},
    "compot": {"method": "compot"},
}


class SmolLM2:
    """The model, and two texts of one sort."""

    layers, window, windows, samples, length = (2, 14, 27), 1024, 30, 96, 256

    def __init__(self, data):
        self.where, self.name = setups.smollm2()
        self.data = data

    def model(self):
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.where, dtype=torch.float32)

    def statistics(self, model, part, targets="all-linear"):
        """Grams of the inputs of `targets`, on the text `part`."""
        calibration = Calibration(str(self.data / "calib_wikipedia" / f"{part}.jsonl"), self.samples, self.length)
        tokenizer = AutoTokenizer.from_pretrained(self.where)
        return collect_statistics(model, calibration, tokenizer, method="compot", target_modules=targets)

    def held_out(self):
        """Token ids to predict."""
        text = texts(self.data, self.window, self.windows)["wikitext2"].data
        return AutoTokenizer.from_pretrained(self.where)(text, return_tensors="pt")["input_ids"][0]


class Tiny:
    """A random model of two layers and English prose."""

    name, layers, window, windows, samples, length = "smoke", (0, 1), 16, 4, 24, 24

    def __init__(self, folder):
        self.where = setups.tiny(folder)

    def model(self):
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.where, dtype=torch.float32)

    def statistics(self, model, part, targets="all-linear"):
        """Grams of the inputs of `targets`, on one of two parts of the prose."""
        english = setups.english()
        text = english[:20_000] if part == "train" else english[20_000:40_000]
        calibration = Calibration([text], self.samples, self.length)
        tokenizer = AutoTokenizer.from_pretrained(self.where)
        return collect_statistics(model, calibration, tokenizer, method="compot", target_modules=targets)

    def held_out(self):
        """Token ids to predict."""
        text = setups.english()[40_000:42_000]
        return AutoTokenizer.from_pretrained(self.where)(text, return_tensors="pt")["input_ids"][0]


def method_of(variant, sweeps, accounting):
    """The method that a variant stands for."""
    if variant in ("ksvd", "mod"):
        return METHODS["cospadi"](solver=variant, num_iters=sweeps, accounting=accounting)
    return METHODS["compot"](accounting=accounting) if variant == "compot" else METHODS[variant]()


def rank_within(method, shape, budget):
    """The highest rank whose numbers fit `budget`."""
    fits = (r for r in range(min(shape), 0, -1) if method.counted(FORMATS[method.format], *shape, r) <= budget)
    return next(fits)


def relative_error(weight, approximation, gram):
    """Of the outputs, in the norm of all tokens together."""
    difference = weight - approximation
    return float((((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum()).sqrt())


def measure_matrices(task, path, ratios, variants, sweeps, accounting):
    """Fill in what `path` lacks; one run is `{"error", "stored", "seconds", "rank", "bytes"}`."""
    facts = {"model": task.name, "tokens": task.samples * task.length, "sweeps": sweeps, "accounting": accounting}
    found = runs.opened(path, facts, seed=0)
    names = [f"model.layers.{layer}.{leaf}" for layer in task.layers for leaf in LEAVES]
    wanted = [(n, str(ratio), v) for n in names for ratio in ratios for v in variants]
    wanted = [cell for cell in wanted if cell[2] not in found["runs"].get(cell[0], {}).get(cell[1], {})]
    if not wanted:
        return found
    model = task.model()
    train, held_out = (task.statistics(model, part, names) for part in ("train", "validation"))
    for name, ratio, variant in wanted:
        weight = model.get_submodule(name).weight.detach().double()
        method = method_of(variant, sweeps, accounting)
        rank = rank_within(method, weight.shape, float(ratio) * weight.numel())
        # What is factorized is stored in bfloat16, as it is where sizes are counted.
        seconds, factors = timed(
            lambda m=method, w=weight, r=rank, n=name: m.factorize(w, r, train.get(n, m.statistics))
        )
        layer = FORMATS[method.format].from_factors(factors, dtype=torch.bfloat16)
        gram = held_out.get(name, ["input_gram"])["input_gram"].double()
        cells = found["runs"].setdefault(name, {}).setdefault(ratio, {})
        cells[variant] = {
            "error": relative_error(weight, factors.product(), gram),
            "stored": relative_error(weight, layer.exact_weight(), gram),
            "seconds": seconds,
            "rank": rank,
            "bytes": sum(tensor.nbytes for tensor in layer.state_dict().values()),
            "shape": list(weight.shape),
        }
        found["environment"], found["command"] = evaluation.environment(), command()
        runs.write(path, found)
        print(f"{name} {ratio} {variant}: {cells[variant]['error']:.4f}, {seconds:.1f} s", flush=True)
    return found


def measure_model(task, path, ratio):
    """Fill in the perplexities that `path` lacks."""
    found = json.loads(path.read_text())
    models = found.setdefault("models", {})
    missing = [name for name in ("dense", *MODELS) if name not in models]
    if not missing:
        return found
    ids, dense = task.held_out(), task.model()
    statistics = task.statistics(dense, "train") if set(missing) - {"dense", "svd"} else None
    for name in missing:
        model, seconds = task.model(), 0.0
        if name != "dense":
            config = LowRankConfig(param_ratio=ratio, rank_multiple=1, allocation="uniform", **MODELS[name])
            given = statistics if config.needs_statistics else None
            seconds, model = timed(lambda m=model, c=config, s=given: factorize(m, c, calibration=s))
        model = model.to(torch.bfloat16)
        made = {"perplexity": perplexity(model, ids, task.window, task.windows), "seconds": seconds}
        rows = summary(model).rows
        made["kept"] = sum(r.bytes for r in rows) / sum(r.dense_bytes for r in rows) if rows else 1.0
        models[name] = {**made, "ratio": ratio}
        found["environment"], found["command"] = evaluation.environment(), command()
        runs.write(path, found)
        print(f"{name}: perplexity {made['perplexity']:.4g}, {seconds:.0f} s", flush=True)
    return found


def show(found, variants):
    """Print the tables: errors (and those as stored in bfloat16), then seconds, then the models."""
    for what, form in (("error", "{error:.4f} ({stored:.4f})"), ("seconds", "{seconds:.1f}")):
        print(f"\n{what:<32} {'ratio':>5}  " + "  ".join(f"{variant:>15}" for variant in variants))
        for name, ratios in found["runs"].items():
            for ratio, cells in ratios.items():
                row = [form.format(**cells[variant]) if variant in cells else "" for variant in variants]
                print(f"{name.removeprefix('model.'):<32} {ratio:>5}  " + "  ".join(f"{cell:>15}" for cell in row))
    for name, made in found.get("models", {}).items():
        print(f"{name:<24} {made['perplexity']:>10.4g} {made['kept']:>7.1%} of the bytes {made['seconds']:>7.0f} s")


def main():
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--accounting", default="mask", choices=("mask", "effective"))
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        task = Tiny(folder) if asked.smoke else SmolLM2(asked.data)
        path = Path(folder) / "smoke.json" if asked.smoke else asked.output
        sweeps = 2 if asked.smoke else asked.sweeps
        found = measure_matrices(task, path, asked.ratios, asked.variants, sweeps, asked.accounting)
        if asked.end_to_end or asked.smoke:
            found = measure_model(task, path, asked.ratios[0])
    show(found, asked.variants)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
