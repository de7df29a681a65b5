"""The map of formats: error over stored bytes, every method on the same real matrices.

    PYTHONPATH=examples python examples/benchmarks/formats_map.py [--data DIR] [--ratios 0.9 0.8 0.6 0.4]
        [--variants NAME ...] [--end-to-end] [--draw] [--docs] [--smoke]

Matrices are queries, keys and values, and the last MLP matrix, of an early, a middle and a late block of SmolLM2-135M
and of MiniLM. Methods get 64 x 256 tokens of `calib_wikipedia/train.jsonl` where they ask for data; on as many of
`validation.jsonl` the outputs are off by

    sqrt(sum_t ||(W - W') x_t + b - b'||^2 / sum_t ||W x_t||^2),

summed over the matrices of one sort in one block, with the factors as bfloat16 stores them. Stored bytes are those of
the file. A variant is a method with its default format and options, or what `VARIANTS` says; weights in 8 and 4 bits
by torchao stand beside them. What a method refuses leaves its reason in the file.

`--end-to-end` factorizes every linear of the blocks of SmolLM2 at 0.8 by each calibrated variant, and by `svd`, with
the allocation that is its default, and measures perplexity on `wikitext2` over 8 windows of 1024 tokens, in float32.

Writes results/formats_map.json after every number, goes on where it was stopped, and draws results/formats_map.png;
`--draw` only draws, `--docs` also puts the table into docs/formats-map.md. `--smoke` takes a tiny random model and
leaves nothing.
"""

import argparse
import gc
import json
import math
import os
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks import runs, setups
from benchmarks.adapters import DATA
from benchmarks.quality import GROUP, texts, timed
from benchmarks.table import cell, into_readme
from hf_lowrank import METHODS, Calibration, LowRankConfig, collect_statistics, evaluation, factorize
from hf_lowrank.errors import LowRankError
from hf_lowrank.evaluation import perplexity
from hf_lowrank.formats import plain
from hf_lowrank.provenance import command
from hf_lowrank.sizes import tensor_bytes
from hf_lowrank.surgery import factorized


RESULTS = Path(__file__).parent / "results" / "formats_map.json"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "formats-map.md"
# Beside every method by itself. K-SVD takes minutes a matrix, and least squares with few sweeps comes close to it
# (`dictionaries.py`); the scores of `lpaf` are what training leaves.
VARIANTS = {
    "svd, pivoted": {"method": "svd", "format": "pivoted"},
    "whitened_svd, pivoted": {"method": "whitened_svd", "format": "pivoted"},
    "kfac_svd, low_rank": {"method": "kfac_svd", "format": "low_rank"},
    "basis_sharing": {"method": {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["QKV"]]}},
    "cospadi": {"method": {"name": "cospadi", "solver": "mod", "num_iters": 2}},
    "lpaf": {"method": {"name": "lpaf", "row_importance": "none"}},
}
BITS = ("int8", "int4")
SORTS = ("attention", "mlp")


class Decoder:
    """SmolLM2-135M."""

    blocks, samples, length, window, windows = (2, 14, 27), 64, 256, 1024, 8
    attention = tuple(f"model.layers.{{}}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj"))
    mlp = ("model.layers.{}.mlp.down_proj",)

    def __init__(self, data):
        self.data = data
        self.where, self.name = setups.smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.where)

    def load(self):
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.where, dtype=torch.float32)

    def calibration(self, part):
        """`"train"` or `"validation"`."""
        return Calibration(str(self.data / "calib_wikipedia" / f"{part}.jsonl"), self.samples, self.length)

    def held_out(self):
        """Token ids to predict."""
        text = texts(self.data, self.window, self.windows)["wikitext2"].data
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]

    def matrices(self):
        """`{"<sort>.<block>": names}`."""
        return {
            f"{sort}.{block}": [name.format(block) for name in getattr(self, sort)]
            for block in self.blocks
            for sort in SORTS
        }


class Encoder(Decoder):
    """MiniLM, which has no head whose loss a method could ask for."""

    blocks = (0, 3, 5)
    attention = tuple(f"encoder.layer.{{}}.attention.self.{leaf}" for leaf in ("query", "key", "value"))
    mlp = ("encoder.layer.{}.output.dense",)

    def __init__(self, data):
        self.data = data
        self.where, self.name = str(setups.minilm()), "all-MiniLM-L6-v2"
        self.tokenizer = AutoTokenizer.from_pretrained(self.where)

    def load(self):
        """The dense model."""
        return AutoModel.from_pretrained(self.where)


class Tiny(Decoder):
    """A random decoder of two layers and English prose."""

    blocks, samples, length, window, windows = (0, 1), 24, 24, 16, 4

    def __init__(self, folder):
        self.where, self.name = setups.tiny(folder), "smoke"
        self.tokenizer = AutoTokenizer.from_pretrained(self.where)

    def calibration(self, part):
        """One of two parts of the prose."""
        english = setups.english()
        text = english[:20_000] if part == "train" else english[20_000:40_000]
        return Calibration([text], self.samples, self.length)

    def held_out(self):
        """Token ids to predict."""
        return self.tokenizer(setups.english()[40_000:42_000], return_tensors="pt")["input_ids"][0]


def variants():
    """Every method that approximates a weight, and what `VARIANTS` adds."""
    methods = [name for name in METHODS.names() if not METHODS[name]().initialises]
    return [*methods, *(name for name in VARIANTS if name not in methods)]


def config_of(variant, task, **more):
    """The [`LowRankConfig`] of a variant."""
    given = json.loads(json.dumps(VARIANTS.get(variant, {"method": variant})))
    if isinstance(given["method"], dict) and "joint_groups" in given["method"]:
        given["method"]["joint_groups"] = [[name.rpartition(".")[2] for name in task.attention]]
    return LowRankConfig(**given, **more)


class Collected:
    """Statistics of the calibration text, collected once for all methods that read the same."""

    def __init__(self, task, targets):
        self.task, self.targets, self.by_names = task, targets, {}

    def of(self, model, config):
        """What `config` is to be given as `calibration`."""
        if not config.needs_statistics:
            return None
        if config.compares:
            return self.task.calibration("train")
        names = tuple(config.method.statistics)
        if names not in self.by_names:
            data, tokenizer = self.task.calibration("train"), self.task.tokenizer
            given = {"method": config.method, "target_modules": self.targets}
            self.by_names[names] = collect_statistics(model, data, tokenizer, **given)
        return self.by_names[names]


class Reference:
    """Dense weights, and the second moments of what they read in the held-out text."""

    def __init__(self, task, targets):
        model = task.load()
        given = {"method": "feature_pca", "target_modules": targets}
        seen = collect_statistics(model, task.calibration("validation"), task.tokenizer, **given)
        self.weights, self.moments = {}, {}
        for name in targets:
            layer = model.get_submodule(name)
            self.weights[name] = layer.weight.detach().double(), self._bias(layer)
            found = seen.get(name, ["input_covariance", "input_mean"])
            mean = found["input_mean"].double()
            self.moments[name] = found["input_covariance"].double() + torch.outer(mean, mean), mean

    @staticmethod
    def _bias(layer):
        return 0.0 if layer.bias is None else layer.bias.detach().double()

    def error(self, model, names):
        """Of the outputs of all of `names`, relative to these without their biases."""
        lost = total = 0.0
        for name in names:
            (weight, bias), (moment, mean) = self.weights[name], self.moments[name]
            layer = model.get_submodule(name)
            applied = layer.exact_weight() if hasattr(layer, "exact_weight") else plain(layer)
            difference, shift = weight - applied.detach().double(), bias - self._bias(layer)
            lost += ((difference @ moment) * difference).sum()
            if isinstance(shift, torch.Tensor):
                lost += 2 * shift @ (difference @ mean) + shift.square().sum()
            total += ((weight @ moment) * weight).sum()
        return math.sqrt(lost / total)


def stored_bytes(model, names):
    """Bytes of the weights of `names`, each tensor once."""
    kinds = factorized(model)
    tensors = []
    for name in names:
        layer = model.get_submodule(name)
        tensors.extend(kinds[name].stored(model, name).values() if name in kinds else [layer.weight])
    return sum(tensor_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def quantized(model, bits, targets):
    """The model with `targets` in 8 or 4 bits, in place."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if bits == "int8" else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    quantize_(model, config, filter_fn=lambda module, name: name in targets)
    return model


def points(task, ratios, chosen):
    """`(ratio, variant)` of everything to measure; bits have a ratio of their own."""
    return [(str(ratio), variant) for variant in chosen for ratio in ratios] + [("bits", bits) for bits in BITS]


def measure_matrices(task, path, ratios, chosen):
    """Fill in what `path` lacks: a run is `{"<sort>.<block>": {"error", "bytes", "dense_bytes"}}`, or a refusal."""
    facts = {"tokens": task.samples * task.length}
    found = runs.opened(path, facts, seed=0)
    measured = found["runs"].setdefault(task.name, {})
    wanted = [(r, v) for r, v in points(task, ratios, chosen) if r not in measured.get(v, {})]
    if not wanted:
        return found
    matrices = task.matrices()
    targets = [name for names in matrices.values() for name in names]
    reference, collected = Reference(task, targets), Collected(task, targets)
    for ratio, variant in wanted:
        model = task.load()
        try:
            if variant in BITS:
                seconds, model = timed(lambda m=model, v=variant: quantized(m.to(torch.bfloat16), v, set(targets)))
            else:
                sizes = {"param_ratio": float(ratio), "rank_multiple": 1, "allocation": "uniform"}
                config = config_of(variant, task, target_modules=targets, **sizes)
                given = collected.of(model, config)
                seconds, model = timed(lambda m=model, c=config, g=given: factorize(m, c, g, task.tokenizer))
        except LowRankError as refusal:
            run = {"refused": str(refusal)}
        else:
            model = model.to(torch.bfloat16)
            run = {"seconds": seconds}
            for label, names in matrices.items():
                dense = 2 * sum(reference.weights[name][0].numel() for name in names)
                size = stored_bytes(model, names)
                run[label] = {"error": reference.error(model, names), "bytes": size, "dense_bytes": dense}
        measured.setdefault(variant, {})[ratio] = run
        found["environment"], found["command"] = evaluation.environment(), command()
        runs.write(path, found)
        print(task.name, ratio, variant, run.get("refused") or _pooled(run), flush=True)
        del model
        gc.collect()
    return found


def _pooled(run):
    """`{sort: (mean error, part of the bytes)}` over the blocks of a run."""
    pooled = {}
    for sort in SORTS:
        cells = [cell for label, cell in run.items() if label.startswith(sort)]
        size = sum(cell["bytes"] for cell in cells) / sum(cell["dense_bytes"] for cell in cells)
        pooled[sort] = (round(sum(cell["error"] for cell in cells) / len(cells), 4), round(size, 4))
    return pooled


def measure_models(task, path, ratio, chosen):
    """Fill in the perplexities that `path` lacks."""
    found = json.loads(path.read_text())
    models = found.setdefault("models", {})
    calibrated = [v for v in chosen if v == "svd" or config_of(v, task).needs_statistics]
    missing = [v for v in ("dense", *calibrated) if v not in models]
    whole = evaluation.size_of(task.load().to(torch.bfloat16)).linear_bytes
    collected, ids = Collected(task, "all-linear"), task.held_out()
    for variant in missing:
        model, seconds = task.load(), 0.0
        try:
            if variant != "dense":
                config = config_of(variant, task, param_ratio=ratio)
                given = collected.of(model, config)
                seconds, model = timed(lambda m=model, c=config, g=given: factorize(m, c, g, task.tokenizer))
        except LowRankError as refusal:
            models[variant] = {"refused": str(refusal)}
        else:
            model = model.to(torch.bfloat16)
            # Layers that an allocation leaves dense are part of the budget too.
            kept = evaluation.size_of(model).linear_bytes / whole
            value = perplexity(model.float(), ids, task.window, task.windows).perplexity
            models[variant] = {"perplexity": value, "kept": kept, "seconds": seconds, "ratio": ratio}
        found["environment"], found["command"] = evaluation.environment(), command()
        runs.write(path, found)
        print(variant, models[variant], flush=True)
        del model
        gc.collect()
    return found


def front(measured, sort):
    """Variants of which no other has a lower error in no more bytes, at each of their points that it reaches."""
    curves = {
        variant: [_pooled(run)[sort] for run in ratios.values() if "refused" not in run]
        for variant, ratios in measured.items()
        if variant not in BITS
    }

    def beats(points, own):
        # Ranks are whole numbers, so that sizes of one ratio differ a little.
        smaller = [(error, [e for e, size in points if size <= 1.01 * bound]) for error, bound in own]
        reached = [(error, found) for error, found in smaller if found]
        return bool(reached) and all(min(found) < error for error, found in reached)

    return [v for v, own in curves.items() if own and not any(beats(c, own) for o, c in curves.items() if o != v)]


def show(found):
    """Print error and bytes, and what no other variant beats."""
    for name, measured in found["runs"].items():
        print(f"\n{name}: mean error of outputs over three blocks, and bytes as a part of the dense ones")
        for variant, ratios in measured.items():
            for ratio, run in ratios.items():
                cells = run.get("refused", "") or "  ".join(
                    f"{sort} {error:.4f} at {size:.3f}" for sort, (error, size) in _pooled(run).items()
                )
                print(f"  {variant:<22} {ratio:>5}  {cells}")
        for sort in SORTS:
            print(f"  {sort}: not dominated are {', '.join(front(measured, sort))}")
    for variant, made in found.get("models", {}).items():
        cells = made.get("refused") or f"{made['perplexity']:.4g} at {made['kept']:.3f}, {made['seconds']:.0f} s"
        print(f"{variant:<22} {cells}")


def table(found):
    """Lines of Markdown: errors at each ratio, the lowest of the first model first, and perplexities."""
    models = {variant: made for variant, made in found.get("models", {}).items() if "refused" not in made}
    names = list(found["runs"])
    ratios = sorted({r for m in found["runs"].values() for v, runs_of in m.items() if v not in BITS for r in runs_of})
    ratios.reverse()
    columns = [(name, sort) for name in names for sort in SORTS]
    head = ["", *(f"{name.split()[0]}, {sort}" for name, sort in columns), "perplexity"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    chosen = {variant for measured in found["runs"].values() for variant in measured}

    def errors(variant, name, sort):
        measured = found["runs"][name].get(variant, {})
        kept = [measured.get(ratio) for ratio in (["bits"] if variant in BITS else ratios)]
        return [_pooled(run)[sort][0] if run and "refused" not in run else None for run in kept]

    def first(variant):
        found = [errors(variant, names[0], sort)[0] for sort in SORTS]
        return math.inf if None in found else sum(found)

    for variant in sorted(chosen, key=lambda variant: (first(variant), variant)):
        cells = (" / ".join("-" if e is None else f"{e:.3f}" for e in errors(variant, *column)) for column in columns)
        lines.append([f"`{variant}`", *cells, cell(models[variant], None) if variant in models else ""])
    caption = f"At {' / '.join(ratios)} of the bytes; `int8` keeps 0.50 and `int4` 0.28."
    if "dense" in models:
        caption += f" Perplexity of the whole {names[0].split()[0]} at 0.8, {models['dense']['perplexity']:.1f} dense."
    return caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(found, path):
    """Error over bytes, a panel a sort and block, a row a model and sort."""
    from matplotlib.figure import Figure

    rows = [(name, sort) for name in found["runs"] for sort in SORTS]
    blocks = {name: _blocks(measured) for name, measured in found["runs"].items()}
    figure = Figure(figsize=(13, 3.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), max(len(b) for b in blocks.values()), squeeze=False)
    styles = {v: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10]} for i, v in enumerate(variants())}
    for row, (name, sort) in zip(panels, rows, strict=True):
        for axes, block in zip(row, blocks[name], strict=False):
            for variant, ratios in found["runs"][name].items():
                cells = [run[f"{sort}.{block}"] for run in ratios.values() if "refused" not in run]
                curve = sorted((cell["bytes"] / cell["dense_bytes"], cell["error"]) for cell in cells)
                style = styles.get(variant, {"color": "black", "marker": "*"})
                if curve:
                    axes.plot(*zip(*curve, strict=True), label=variant, linewidth=1, **{"marker": ".", **style})
            axes.set_title(f"{name.split()[0]}, {sort}, block {block}", fontsize=9)
            axes.set(xlabel="bytes of bfloat16 kept", yscale="log")
    panels[0][0].set_ylabel("error of outputs")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    runs.save_figure(figure, path)


def _blocks(measured):
    """The blocks of what has been measured, in order."""
    labels = {key for ratios in measured.values() for run in ratios.values() for key in run if "." in key}
    return sorted({int(label.rpartition(".")[2]) for label in labels})


def main():
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--variants", nargs="+", default=variants(), choices=variants(), metavar="NAME")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smoke.json" if asked.smoke else asked.output
        if asked.draw or asked.docs:
            found = json.loads(path.read_text())
        else:
            tasks = [Tiny(folder)] if asked.smoke else [Decoder(asked.data), Encoder(asked.data)]
            for task in tasks:
                found = measure_matrices(task, path, asked.ratios, asked.variants)
            if asked.end_to_end or asked.smoke:
                found = measure_models(tasks[0], path, 0.8, asked.variants)
        show(found)
        draw(found, path.with_suffix(".png"))
        if asked.docs:
            DOCS.write_text(into_readme(DOCS.read_text(encoding="utf-8"), table(found), "map"), encoding="utf-8")


if __name__ == "__main__":
    main()
