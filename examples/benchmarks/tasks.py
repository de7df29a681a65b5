"""Sentence classification on MiniLM: data, batches, training and scores, for the benchmarks that train."""

import json
import os
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks import setups


DATA = Path(os.environ.get("HF_LOWRANK_DATA", "../shared/data"))
GLUE = {"sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"), "rte": ("sentence1", "sentence2")}
LENGTH = 96
# Every linear of the repeated blocks.
INSIDE = r".*\.layers?\.\d+\..*\.(query|key|value|dense|[qkvo]_proj|gate_proj|up_proj|down_proj)"


def read(path):
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Classification:
    """One GLUE task.

    Args:
        name (`str`): a key of `GLUE`.
        data (`Path`): the folder that holds `glue/<name>/{train,validation}.jsonl`.
        batch (`int`, defaults to 32): sentences a training step; of pairs, half as many.
        where (`str`, *optional*): folder of the encoder and its tokenizer; MiniLM by default.
    """

    metric, better = "accuracy", "higher"

    def __init__(self, name, data, batch=32, where=None):
        self.name = name
        self.where = str(setups.minilm()) if where is None else str(where)
        self.tokenizer = AutoTokenizer.from_pretrained(self.where)
        self.train, self.validation = (
            [self._encoded(row, GLUE[name]) for row in read(data / "glue" / name / f"{part}.jsonl")]
            for part in ("train", "validation")
        )
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.batch = batch if GLUE[name][1] is None else batch // 2

    def _encoded(self, row, keys):
        sentences = [row[key] for key in keys if key is not None]
        return {**self.tokenizer(*sentences, truncation=True, max_length=LENGTH), "labels": row["label"]}

    def batches(self, count, size, labels):
        """The first `count` training rows in batches of `size`, with or without their labels."""
        rows = [{k: v for k, v in row.items() if labels or k != "labels"} for row in self.train[:count]]
        return [dict(self.collator(rows[i : i + size])) for i in range(0, len(rows), size)]

    def dense(self):
        """The encoder with a new classifier."""
        return AutoModelForSequenceClassification.from_pretrained(self.where, num_labels=2)

    @torch.no_grad()
    def score(self, model):
        """Accuracy on the whole validation set."""
        model.eval()
        rows = sorted(self.validation, key=lambda row: len(row["input_ids"]))
        right = 0
        for start in range(0, len(rows), 64):
            batch = self.collator(rows[start : start + 64])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(rows)


def train(task, model, rate, seed, steps, folder, kind=Trainer, callbacks=()):
    """Run `steps` batches in the order that `seed` gives, and return the Trainer, a `kind` with `callbacks`."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=task.batch,
        learning_rate=rate,
        lr_scheduler_type="linear",
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
    given = {"train_dataset": task.train, "data_collator": task.collator, "callbacks": list(callbacks)}
    trainer = kind(model, arguments, **given)
    trainer.train()
    return trainer
