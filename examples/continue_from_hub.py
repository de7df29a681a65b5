"""Fine-tune a compressed model from the Hub with Trainer, and push it on.

    python examples/continue_from_hub.py FROM TO [--text FILE] [--steps 50] [--learning-rate 1e-4] [--smoke]

FROM is a repository such as `examples/push_and_pull.py` makes. Factors are ordinary parameters: they train as they
are, and no dense weight is ever formed.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.setups import english
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hf_lowrank


def blocks(text, tokenizer, length):
    """Rows of `length` tokens for a causal language model."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main():
    """Pull, train, push."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="FROM", help="a repository with a factorized model and its tokenizer")
    parser.add_argument("target", metavar="TO", help="where to push")
    parser.add_argument("--text", help="text file to train on; Python's own language reference by default")
    parser.add_argument("--steps", type=int, default=50, help="of 8 rows of 256 tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    model = AutoModelForCausalLM.from_pretrained(arguments.source)
    print(f"pulled: {hf_lowrank.summary(model).line}")
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else english()
    if arguments.smoke:
        text, arguments.steps = text[:4096], min(arguments.steps, 8)
    rows = blocks(text, tokenizer, 32 if arguments.smoke else 256)
    # The end of the text is held out.
    held_out, rows = rows[-16:], rows[:-16]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=arguments.learning_rate,
            logging_steps=max(1, arguments.steps // 5),
            save_strategy="no",
            report_to=[],
            hub_model_id=arguments.target,
        )
        data = {"train_dataset": rows, "eval_dataset": held_out, "data_collator": default_data_collator}
        # The tokenizer is pushed with the model.
        trainer = Trainer(model, settings, processing_class=tokenizer, **data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        commit = trainer.push_to_hub()
    print(f"held-out perplexity: {math.exp(before):.2f} -> {math.exp(after):.2f}")
    print(f"pushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
