"""A small Llama from scratch: full rank, low rank, and low rank plus single entries.

    PYTHONPATH=examples python examples/benchmarks/pretraining.py [--data DIR] [--texts tinyshakespeare wikipedia]
        [--variants full "low rank" ...] [--seeds 3] [--steps 400] [--rate 3e-3] [--docs]

Bytes are the tokens, so that no tokenizer decides. Every variant of a seed begins with the same embeddings, norms and
head, and sees the same batches at the same learning rates, with AdamW, 10 % warm-up and a cosine to a tenth. Low
rank has the rank of SLTrain, or as many trained numbers, or as many stored bytes, which count the places of entries
too. `sltrain, magnitude` takes its places from the full-rank model of the same seed, trained before; everything else
of it is new. Perplexity is that of a byte, on held-out text. Memory is that of parameters, gradients and Adam's
moments, and what autograd keeps from forward to backward in one step; results also hold the growth of the resident
set over the run. Writes results/pretraining/<text>.json after every run and goes on where it was stopped. A run takes
about a minute on one core. `--docs` runs nothing and writes the table between `<!-- pretraining -->` and
`<!-- /pretraining -->` of docs/training.md.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, logging, set_seed

from benchmarks import setups
from benchmarks.metrics import PeakMemory
from benchmarks.runs import compared, write
from benchmarks.table import ROOT, into_readme
from benchmarks.tasks import DATA, read
from hf_lowrank import LowRankConfig, evaluation, factorize, summary


RESULTS = Path(__file__).parent / "results" / "pretraining"
DOCS = ROOT / "docs" / "training.md"
RANK, DENSITY, SCALE = 4, 0.05, 1.0
WINDOW, BATCH = 64, 8
CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": WINDOW, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FULL, LOW, PARAMETERS, BYTES, RANDOM, MAGNITUDE = VARIANTS = (
    "full", "low rank", "low rank, equal parameters", "low rank, equal bytes", "sltrain", "sltrain, magnitude",
)  # fmt: skip


def shakespeare(data):
    """`{part: text}`; the last tenth is held out."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return {"train": text[:cut], "validation": text[cut:]}


def wikipedia(data):
    """`{part: text}` of paragraphs."""
    return {
        part: "\n\n".join(row["text"] for row in read(data / "calib_wikipedia" / f"{part}.jsonl"))
        for part in ("train", "validation")
    }


TEXTS = {"tinyshakespeare": shakespeare, "wikipedia": wikipedia}


def as_ids(text):
    """Bytes as token ids."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()


def new_model(seed):
    """A model from its config, the same for every variant of a seed."""
    set_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))


def start(variant, seed, trained):
    """The model that `variant` begins with; `trained` is the full-rank model of the seed, where it is asked for."""
    model = new_model(seed)
    if variant == FULL:
        return model
    if variant == MAGNITUDE:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "_proj" in name:
                    own[name].copy_(parameter)
    return factorize(model, recipe(variant, seed))


def recipe(variant, seed):
    """How the weights of `variant` are stored."""
    method = {"name": "sltrain", "alpha": SCALE * RANK, "density": DENSITY if "sltrain" in variant else 0}
    if variant == MAGNITUDE:
        method["support"] = "magnitude"
    if variant not in (PARAMETERS, BYTES):
        return LowRankConfig(method=method, rank=RANK, seed=seed)
    twin = factorize(new_model(0), recipe(RANDOM, 0))
    # A place takes four bytes, as much as a number. Ranks differ by shape then, and so does the scale.
    places = sum(buffer.numel() for name, buffer in twin.named_buffers() if name.endswith("indices"))
    numbers = sum(row.parameters for row in summary(twin).rows) - (places if variant == PARAMETERS else 0)
    return LowRankConfig(method=method, target_params=numbers, rank_multiple=1, seed=seed)


def saved_bytes(model, batch):
    """Bytes that autograd keeps for the backward pass of one step, parameters and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch).loss
    found = sum(kept.values())
    loss.backward()
    model.zero_grad()
    return found


def train(model, windows, seed, steps, rate, folder):
    """Run `steps` batches in the order that `seed` gives."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        seed=seed,
        data_seed=seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model, arguments, train_dataset=data).train()


def one_run(ids, variant, seed, steps, rate, scratch, trained):
    """`(model, facts)` of one variant under one seed."""
    model = start(variant, seed, trained)
    windows = [window for window in ids["train"].split(WINDOW) if len(window) == WINDOW]
    facts = {"saved_bytes": saved_bytes(model.train(), torch.stack(windows[:BATCH]))}
    begin = time.perf_counter()
    with PeakMemory("RssAnon") as memory:
        train(model, windows, seed, steps, rate, scratch)
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    facts["resident_growth"] = memory.peak
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    facts["bytes"] = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # A gradient and two moments beside each parameter.
    facts["training_bytes"] = facts["bytes"] + 3 * 4 * facts["parameters"] + facts["saved_bytes"]
    facts["score"] = evaluation.perplexity(model.eval(), ids["validation"], WINDOW, 400).perplexity
    return model, facts


def full_rank(ids, seed, steps, rate, scratch, folder):
    """The full-rank model of a seed, kept in `folder` or trained again."""
    if not folder.is_dir():
        keep(one_run(ids, FULL, seed, steps, rate, scratch, None)[0], folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def keep(model, folder):
    """Save a model into a folder that appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        model.save_pretrained(Path(partial) / "model")
        if not folder.is_dir():
            os.replace(Path(partial) / "model", folder)


def measure(name, data, variants, seeds, steps, rate, output, cache):
    """Fill in the runs that <output>/<name>.json lacks."""
    path = output / f"{name}.json"
    facts = {
        "text": name, "steps": steps, "batch": BATCH, "window": WINDOW, "rate": rate, "rank": RANK, "density": DENSITY,
        "scale": SCALE, "model": CONFIG, "metric": "perplexity of a byte", "better": "lower",
    }  # fmt: skip
    found = json.loads(path.read_text()) if path.exists() else {**facts, "runs": {}}
    if any(found[key] != value for key, value in facts.items()):
        raise SystemExit(f"{path} was measured otherwise; remove it to measure again.")
    wanted = [(seed, v) for seed in range(seeds) for v in variants if str(seed) not in found["runs"].get(v, {})]
    ids = {part: as_ids(text) for part, text in TEXTS[name](data).items()} if wanted else None
    with tempfile.TemporaryDirectory() as scratch:
        for seed, variant in wanted:
            kept = cache / f"{name}-{seed}-{steps}-{rate:g}"
            trained = full_rank(ids, seed, steps, rate, scratch, kept) if variant == MAGNITUDE else None
            model, run = one_run(ids, variant, seed, steps, rate, scratch, trained)
            if variant == FULL:
                keep(model, kept)
            found["runs"].setdefault(variant, {})[str(seed)] = run
            found["environment"] = evaluation.environment()
            write(path, found)
            print(f"{name} {variant} {seed}: {run['score']:.4g} in {run['seconds']} s", flush=True)


def table(folder=RESULTS):
    """Markdown: means over seeds, and the paired difference from low rank of equal size with its 95 % interval."""
    head = "text", "variant", "seeds", "parameters", "MiB", "in training", "perplexity", "minus equal parameters"
    lines = [f"| {' | '.join(head)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for path in sorted(Path(folder).glob("*.json")):
        found = json.loads(path.read_text())
        baseline = found["runs"].get(PARAMETERS, {})
        for name in [name for name in VARIANTS if name in found["runs"]]:
            runs = found["runs"][name]
            first = next(iter(runs.values()))
            mean = statistics.mean(run["score"] for run in runs.values())
            difference = None if name == PARAMETERS else compared(runs, baseline)
            said = "" if difference is None else f"{difference[0]:+.3g} ± {difference[1]:.2g}"
            lines.append(
                f"| {found['text']} | {name} | {len(runs)} | {first['parameters']} | {first['bytes'] / 2**20:.2f} "
                f"| {first['training_bytes'] / 2**20:.2f} | {mean:.4g} "
                f"| {said} |"
            )
    return "\n".join(lines) + "\n"


def main():
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=setups.CACHE / "pretraining")
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    if asked.docs:
        DOCS.write_text(into_readme(DOCS.read_text(encoding="utf-8"), table(), "pretraining"), encoding="utf-8")
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    for name in asked.texts:
        sizes = asked.variants, asked.seeds, asked.steps, asked.rate
        measure(name, asked.data, *sizes, asked.output, asked.cache)
    print(table(asked.output), end="")


if __name__ == "__main__":
    main()
