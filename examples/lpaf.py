"""Compress a sentence classifier while it is fine-tuned: prune, factorize what is left, fine-tune factors and weights.

    python examples/lpaf.py [--task sst2] [--data DIR] [--param-ratio 0.25] [--keep-fraction 0.25] [--score movement]
        [--row-importance score] [--recovery mixed|plain] [--steps 300] [--output FOLDER] [--smoke]

The three stages of LPAF (https://arxiv.org/abs/2306.14152, reconstructed) on MiniLM and a task of GLUE, each with
`Trainer`: pruning by first-order scores, an SVD that knows what pruning left, and mixed-rank fine-tuning, or plain
fine-tuning of the factors. The result loads with plain `from_pretrained`. `--data` is a folder with
`glue/<task>/{train,validation}.jsonl`; `--smoke` runs a tiny random model on made-up sentences.
"""

import argparse
import os
import tempfile
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
from benchmarks import made_up
from benchmarks.tasks import DATA, GLUE, INSIDE, Classification
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_lowrank import LowRankConfig, MixedRankConfig, factorize, rank_profile, summary
from hf_lowrank.training import FirstOrderPruningCallback, MixedRankTrainer


def arguments_for(asked, folder, steps):
    """What both trainings have in common."""
    return TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=asked.learning_rate,
        warmup_steps=max(1, steps // 10), report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, seed=0,
    )  # fmt: skip


def prune(asked, task, model, folder):
    """Stage 1: fine-tune, and let the weights with the lowest scores become zero; returns what was learned of them."""
    pruning = FirstOrderPruningCallback(asked.score, asked.keep_fraction, keep_scores=True, target_modules=INSIDE)
    arguments = arguments_for(asked, folder, asked.steps // 2)
    data = {"train_dataset": task.train, "data_collator": task.collator}
    Trainer(model, arguments, callbacks=[pruning], **data).train()
    path = f"{folder}/importance.safetensors"
    pruning.statistics(model).save(path)
    return path


def recover(asked, task, model, importance, folder):
    """Stages 2 and 3: factors of the pruned weights, and fine-tuning; returns the factorized model."""
    method = {"name": "lpaf", "row_importance": asked.row_importance}
    config = {"method": method, "param_ratio": asked.param_ratio, "target_modules": INSIDE, "allocation": "uniform"}
    # The other importances are read off the weights.
    importance = importance if asked.row_importance == "score" else None
    arguments = arguments_for(asked, folder, asked.steps - asked.steps // 2)
    data = {"train_dataset": task.train, "data_collator": task.collator}
    if asked.recovery == "plain":
        factorize(model, LowRankConfig(**config), calibration=importance)
        Trainer(model, arguments, **data).train()
        return model
    # The pruned weights stay beside their factors for a while, as sparse as they are.
    mixed = MixedRankConfig(statistics=importance, modules_to_save=["classifier"], **config)
    model = peft.get_peft_model(model, mixed)
    MixedRankTrainer(model, arguments, **data).train()
    return model.merge_and_unload()


def main():
    """Run the pipeline, and say after each stage how good the model is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2", choices=list(GLUE))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--param-ratio", type=float, default=0.25, help="of the encoder's linear parameters, kept")
    parser.add_argument("--keep-fraction", type=float, default=0.25, help="of the weights, left by pruning")
    parser.add_argument("--score", default="movement", choices=["movement", "taylor", "magnitude"])
    parser.add_argument("--row-importance", default="score", choices=["score", "nnz", "none"])
    parser.add_argument("--recovery", default="mixed", choices=["mixed", "plain"])
    parser.add_argument(
        "--steps", type=int, default=300, help="batches of 32 sentences, half of them for each training"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", help="where to save the result; by default it is thrown away")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        where = None
        if asked.smoke:
            where, asked.data = made_up.encoder(f"{folder}/model"), made_up.sentiment(folder)
            asked.steps, asked.learning_rate = 80, 3e-3
        task = Classification(asked.task, asked.data, where=where)
        model = task.dense()
        importance = prune(asked, task, model, folder)
        print(rank_profile(model, target_modules=INSIDE))
        print(f"pruned to {asked.keep_fraction:.0%} of the weights: accuracy {task.score(model):.3f}")
        model = recover(asked, task, model, importance, folder)
        print(summary(model).line)
        accuracy = task.score(model)
        print(f"{asked.param_ratio:.0%} of the linear parameters, factorized: accuracy {accuracy:.3f}")
        output = asked.output or f"{folder}/small"
        model.save_pretrained(output)
        task.tokenizer.save_pretrained(output)
        again = AutoModelForSequenceClassification.from_pretrained(output)
        print(f"loaded again: accuracy {task.score(again):.3f}, the same: {task.score(again) == accuracy}")


if __name__ == "__main__":
    main()
