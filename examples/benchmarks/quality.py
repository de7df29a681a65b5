"""Quality of SmolLM2-135M dense, factorized, and in 8 and 4 bits, beside the bytes each takes.

    PYTHONPATH=examples python examples/benchmarks/quality.py [--data DIR] [--variants NAME ...] [--again]

Writes results/quality/<variant>.json for every variant that has none yet, by default all of quality_variants.json,
which holds their configurations; `table.py` makes a table of them. Another variant is `<method>-<param_ratio>` with
`-self` or `-wikipedia` behind it for the calibration, or any configuration by `--config NAME=JSON`, the JSON being
arguments of `LowRankConfig`, with those of `Calibration` where it has more than a name. After a plus sign follows what
is done then: `+int8` and `+int4` quantize the factors, `int4+residual` adds a LoRA of rank 16 that puts back the
leading part of what quantizing took, calibrated on the model's own samples.

Factors are computed from float32 weights; every variant is stored in bfloat16, or fewer bits, and what is stored is
measured in float32, which is the same on every processor and on most CPUs many times faster. Where the model comes out
of 4-bit weights in groups of 32, quantizing to 4 bits in the same groups loses nothing, so `int4` has groups of 64,
and so have the ranks of what is to be quantized so.
"""

import argparse
import gc
import json
import os
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import setups
from hf_lowrank import (
    Calibration,
    FormatLinear,
    LowRankConfig,
    PerplexityTask,
    collect_statistics,
    evaluate,
    factorize,
    residual_adapter,
)
from hf_lowrank.evaluation import Size, size_of
from hf_lowrank.formats import plain
from hf_lowrank.surgery import match_sites


RESULTS = Path(__file__).parent / "results" / "quality"
DATA = Path(os.environ.get("HF_LOWRANK_DATA", "../shared/data"))
VARIANTS = json.loads((Path(__file__).parent / "quality_variants.json").read_text(encoding="utf-8"))
TASKS = ("piqa/validation", "arc_easy/test", "winogrande/validation", "hellaswag/validation_1000")
QUANTIZED = ("int8", "int4")
GROUP = 64
RESIDUAL_RANK = 16


def texts(data, window, windows):
    """The two texts, as [`PerplexityTask`]s."""
    rows = (data / "wikitext2" / "test_raw_rows.jsonl").read_text(encoding="utf-8").splitlines()
    # The file ends lines with a carriage return, which the data set on the Hub does not have.
    wikitext = "\n\n".join(json.loads(row)["text"] for row in rows).replace("\r\n", "\n")
    shakespeare = data / "tinyshakespeare" / "input.txt"
    named = {"wikitext2": wikitext, "tinyshakespeare": shakespeare}
    return {name: PerplexityTask(text, window=window, max_windows=windows) for name, text in named.items()}


def timed(function):
    """`(seconds, result)` of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


class Maker:
    """Makes variants of the model at `where`, collecting the statistics of one method and calibration once."""

    def __init__(self, where, tokenizer, data):
        self.where, self.tokenizer, self.data = where, tokenizer, data
        self.collected = (None, None)

    def load(self, dtype=torch.bfloat16):
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.where, dtype=dtype)

    def make(self, name, config):
        """`(model, size, record)`: the size as stored, and JSON that says how it was made."""
        first, *rest = name.split("+")
        model, record = self.factorized(config) if config is not None else self.dense()
        size = size_of(model)
        for step in [first, *rest] if first in QUANTIZED else rest:
            do = self.correct if step == "residual" else self.quantize
            model, size, done = do(model, size, step)
            record = {**record, **done, "seconds": {**record["seconds"], **done["seconds"]}}
        return model, size, record

    def dense(self):
        """`(model, record)` of the model as it is."""
        seconds, model = timed(self.load)
        return model, {"seconds": {"load": seconds}}

    def factorized(self, config):
        """`(model, record)` of factors."""
        calibration = self.calibration(config.get("calibration", "self"))
        config = LowRankConfig(**{**config, "calibration": calibration})
        seconds = {}
        seconds["load"], model = timed(lambda: self.load(torch.float32))
        # What compares the two models takes the data itself, and its seconds are counted with the factorization.
        if config.needs_statistics and not config.compares:
            seconds["calibration"], calibration = self.statistics(model, config)
        seconds["factorize"], model = timed(lambda: factorize(model, config, calibration, self.tokenizer))
        return model.to(torch.bfloat16), {"seconds": seconds, "seed": config.seed}

    def calibration(self, given):
        """A [`Calibration`] from a name or a dict of its arguments; files are those in the folder of data."""
        calibration = Calibration(**given) if isinstance(given, dict) else Calibration(given)
        if calibration.data.endswith((".jsonl", ".txt", ".safetensors")):
            return replace(calibration, data=str(self.data / calibration.data))
        return calibration

    def statistics(self, model, config):
        """`(seconds, statistics)`; the seconds are those of the run that collected them."""
        key = (json.dumps(config.to_json()["method"]), str(config.calibration), config.seed)
        if self.collected[0] != key:
            self.collected = (None, None)
            gc.collect()
            options = {"tokenizer": self.tokenizer, "method": config.method, "seed": config.seed}
            self.collected = (key, timed(lambda: collect_statistics(model, config.calibration, **options)))
        return self.collected[1]

    def quantize(self, model, size, kind):
        """Weight-only quantization of the linears that factorization targets, or of the factors in their places."""
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        config = Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
        names = {site.name for site in match_sites(model)}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FormatLinear)}
        for name, layer in layers.items():
            names |= {f"{name}.{leaf}" for leaf, child in layer.named_modules() if isinstance(child, torch.nn.Linear)}
        seconds, _ = timed(lambda: quantize_(model, config, filter_fn=lambda module, name: name in names))
        size = size_of(model)
        # Kernels for CPUs that compute with few bits are many times slower than a dense product, so the weights they
        # stand for are measured in their place.
        for layer in (model.get_submodule(name) for name in names):
            layer.weight = torch.nn.Parameter(plain(layer), requires_grad=False)
        made = {"quantization": str(config), "torchao": version("torchao"), "seconds": {"quantize": seconds}}
        return model, size, made

    def correct(self, model, size, _):
        """The model with a residual adapter on every linear that factorization targets."""
        dense = self.load(torch.float32)
        # With the statistics that the default method takes, so that one collection serves all variants of a run.
        seconds = {}
        seconds["calibration"], statistics = self.statistics(
            dense, LowRankConfig(calibration=self.calibration("self"))
        )
        targets = [site.name for site in match_sites(dense)]
        options = {"rank": RESIDUAL_RANK, "method": "whitened_svd", "target_modules": targets}
        seconds["residual"], model = timed(lambda: residual_adapter(model, dense, statistics=statistics, **options))
        model = model.to(torch.bfloat16)
        added = [p for name, p in model.named_parameters() if "lora_" in name]
        numbers, stored = sum(p.numel() for p in added), sum(p.numel() * p.element_size() for p in added)
        more = {"parameters": numbers, "bytes": stored, "linear_parameters": numbers, "linear_bytes": stored}
        size = Size(**{key: value + more[key] for key, value in asdict(size).items()})
        return model, size, {"residual": f"rank {RESIDUAL_RANK}, whitened_svd", "seconds": seconds}


def parse(name):
    """The arguments of `LowRankConfig` that the name of a variant stands for; `None` for those that have none."""
    if name in VARIANTS:
        return VARIANTS[name]
    first, *rest = name.split("+")
    if first in ("dense", *QUANTIZED):
        return None
    method, ratio, *calibration = first.split("-")
    sources = {"self": "self", "wikipedia": "calib_wikipedia/train.jsonl"}
    if len(calibration) > 1 or not set(calibration) <= set(sources):
        # Else the name of a row that `--config` made would make another one.
        raise SystemExit(f"{name} is no <method>-<param_ratio>[-<calibration>]; give its options: --config NAME=JSON")
    config = {"method": method, "param_ratio": float(ratio)}
    if calibration:
        config["calibration"] = sources[calibration[0]]
    return {**config, "rank_multiple": GROUP} if "int4" in rest else config


def main():
    """Make, measure and write every variant that is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of texts and tasks")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="names, see above")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=JSON", help="one more variant")
    parser.add_argument("--window", type=int, default=1024, help="tokens a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="also variants that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    configs = {name: parse(name) for name in arguments.variants}
    for given in arguments.config:
        name, _, text = given.partition("=")
        configs[name] = json.loads(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    where, base = setups.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(where)
    maker = Maker(where, tokenizer, arguments.data)
    measured = texts(arguments.data, arguments.window, arguments.windows)
    tasks = {path.split("/")[0]: arguments.data / "multiple_choice" / f"{path}.jsonl" for path in TASKS}
    for name, config in configs.items():
        path = arguments.output / f"{name}.json"
        if path.exists() and not arguments.again:
            print(f"{name}: there already")
            continue
        model, size, record = maker.make(name, config)
        result = evaluate(model.float(), tokenizer, perplexity=measured, multiple_choice=tasks, limit=arguments.limit)
        written = {"variant": name, "base": base, "config": config, **record, "evaluation": result.to_json()}
        written["evaluation"]["size"] = vars(size)
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {size.bytes / 2**20:.1f} MiB, {size.linear_bytes / 2**20:.1f} in linears\n{result}\n")
        del model
        gc.collect()


if __name__ == "__main__":
    main()
