"""A language model fitted to one narrow domain at half its size: basis selection against SVD-LLM.

    PYTHONPATH=examples python examples/benchmarks/basis_selection.py [--data DIR] [--ratio 0.5] [--seeds 3]
        [--steps 120] [--variants basis_selection svd_llm dense] [--smoke]

SmolLM2-135M and tinyshakespeare, of which the last tenth is held out. Every variant sees the same `steps` batches of
2 x 256 tokens in the order of its seed. `basis_selection` tunes singular values and added bases for two thirds of
them, dropping bases on the way, and its factors for the rest; the mass it keeps is set so that the initial singular
values would end at `ratio`. `svd_llm` is `whitened_svd`, calibrated on training text, whose factors are tuned all the
time; it gets the size that basis selection has ended at under the same seed. `dense` tunes the same weights, and keeps
them all. Rates are each variant's own. Writes results/basis_selection.json after every run and goes on where it was
stopped; `--smoke` runs a tiny random model and leaves nothing.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    logging,
    set_seed,
)

from benchmarks import setups
from benchmarks.adapters import DATA, INSIDE, write
from benchmarks.metrics import perplexity
from hf_lowrank import LowRankConfig, LowRankLinear, evaluation, factorize, train_only
from hf_lowrank.linalg import singular_energies
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import BasisSelectionCallback


RESULTS = Path(__file__).parent / "results" / "basis_selection.json"
VARIANTS = ("basis_selection", "svd_llm", "dense")
WINDOW, BATCH, SAMPLES = 256, 2, 64
EXTRA, EVENTS = 16, 20
# Scales are few, and take larger steps than whole weights do.
SCALE_RATE, FACTOR_RATE = 1e-3, 1e-4


class Shakespeare:
    """SmolLM2-135M and the plays."""

    name, window, windows, extra, multiple = "tinyshakespeare", WINDOW, 32, EXTRA, 8

    def __init__(self, data):
        self.where, _ = setups.smollm2()
        text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(self.where)(text, return_tensors="pt")["input_ids"][0]
        cut = len(ids) * 9 // 10
        self.train, self.validation = ids[:cut].split(WINDOW)[:-1], ids[cut:]

    def model(self):
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.where, dtype=torch.float32)


class Tiny:
    """A random model of two layers and the bytes of English prose."""

    name, window, windows, extra, multiple = "smoke", 16, 4, 2, 1

    def __init__(self):
        ids = torch.tensor(list(setups.english().encode()[:4000])) % 90 + 3
        self.train, self.validation = ids[:3600].split(self.window)[:-1], ids[3600:]

    def model(self):
        """The dense model."""
        return tiny_model("llama")[0]


def dense_size(model):
    """Parameters of the targets of a dense model."""
    return sum(site.out_features * site.in_features for site in match_sites(model, INSIDE))


def kept(model, whole):
    """Parameters of the targets, biases left out, as a fraction of `whole`."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2 and "_proj" in name]
    return sum(model.get_parameter(name).numel() for name in names) / whole


def mass_for(model, ratio, extra, multiple):
    """The mass of which the singular values of a dense model, with `extra` bases a layer, make `ratio` of its size."""
    spectra = [
        (site, singular_energies(site.kind.weight(model, site)[0]).sqrt()) for site in match_sites(model, INSIDE)
    ]
    budget, low, high = ratio * dense_size(model), 0.0, 1.0
    for _ in range(30):
        middle, size = (low + high) / 2, 0
        for site, values in spectra:
            count = 1 + int((values.cumsum(0) < middle * values.sum()).sum()) + extra
            rank = -(-count // multiple) * multiple
            shape = site.out_features, site.in_features
            size += min(LowRankLinear.cost(*shape, rank), shape[0] * shape[1])
        low, high = (middle, high) if size <= budget else (low, middle)
    return low


def train(task, model, rate, steps, seed, folder, callbacks=()):
    """Train on `steps` batches in the order that `seed` gives."""
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 30), weight_decay=0.0, seed=seed, data_seed=seed,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": window, "labels": window} for window in task.train]
    given = {"train_dataset": rows, "data_collator": default_data_collator, "callbacks": list(callbacks)}
    Trainer(model, arguments, **given).train()


def by_basis_selection(task, ratio, steps, seed, folder):
    """Select bases, then tune factors."""
    model, first = task.model(), 2 * steps // 3
    callback = BasisSelectionCallback(
        mass_for(model, ratio, task.extra, task.multiple), task.extra, min(EVENTS, first // 2),
        rank_multiple=task.multiple, target_modules=INSIDE, seed=seed,
    )  # fmt: skip
    train(task, model, SCALE_RATE, first, seed, folder, [callback])
    # Other batches than those of the first part.
    train(task, train_only(model, "factors"), FACTOR_RATE, steps - first, seed + 1000, folder)
    return model


def by_svd_llm(task, ratio, steps, seed, folder):
    """Whiten, factorize, tune factors."""
    model = task.model()
    batches = [{"input_ids": torch.stack(task.train[i : i + 8])} for i in range(0, min(SAMPLES, len(task.train)), 8)]
    config = LowRankConfig(method="whitened_svd", param_ratio=ratio, rank_multiple=1, target_modules=INSIDE)
    factorize(model, config, calibration=batches)
    train(task, train_only(model, "factors"), FACTOR_RATE, steps, seed, folder)
    return model


def dense(task, ratio, steps, seed, folder):
    """Tune the weights that the others factorize."""
    model = task.model().requires_grad_(False)
    for site in match_sites(model, INSIDE):
        model.get_parameter(site.weight_name).requires_grad_(True)
    train(task, model, FACTOR_RATE, steps, seed, folder)
    return model


def measure(task, path, ratio, variants, seeds, steps):
    """Fill in the runs that `path` lacks; one is `{"score", "kept"}`."""
    facts = {"task": task.name, "ratio": ratio, "steps": steps, "batch": BATCH, "metric": "perplexity"}
    found = json.loads(path.read_text()) if path.exists() else {**facts, "better": "lower", "runs": {}}
    if any(found[key] != value for key, value in facts.items()):
        raise SystemExit(f"{path} was measured otherwise ({found['steps']} steps); remove it to measure again.")
    whole = dense_size(task.model())
    found.setdefault("before", perplexity(task.model().eval(), task.validation, task.window, task.windows))
    for seed in map(str, range(seeds)):
        for variant in variants:
            runs = found["runs"].setdefault(variant, {})
            if seed in runs:
                continue
            if variant == "svd_llm" and seed not in found["runs"].get("basis_selection", {}):
                raise SystemExit("svd_llm takes the size of basis_selection; name that first in --variants.")
            size = found["runs"]["basis_selection"][seed]["kept"] if variant == "svd_llm" else ratio
            set_seed(int(seed))
            make = {"basis_selection": by_basis_selection, "svd_llm": by_svd_llm, "dense": dense}[variant]
            with tempfile.TemporaryDirectory() as folder:
                model = make(task, size, steps, int(seed), folder).eval()
            score = perplexity(model, task.validation, task.window, task.windows)
            runs[seed] = {"score": score, "kept": kept(model, whole)}
            found["environment"] = evaluation.environment()
            write(path, found)
            print(f"{variant} {seed}: perplexity {score:.4g}, {runs[seed]['kept']:.3f} of the parameters", flush=True)


def main():
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    if asked.smoke:
        with tempfile.TemporaryDirectory() as folder:
            measure(Tiny(), Path(folder) / "smoke.json", 0.5, VARIANTS, 1, 9)
        return
    measure(Shakespeare(asked.data), RESULTS, asked.ratio, asked.variants, asked.seeds, asked.steps)


if __name__ == "__main__":
    main()
