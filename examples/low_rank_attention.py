"""Train models with low-rank attention on SST-2, save them, load them again.

    python examples/low_rank_attention.py [--model linformer|lama|gru] [--data DIR] [--steps N] [--output FOLDER]
        [--smoke]

`linformer` is MiniLM whose keys and values are projected along the sequence; `lama` is MiniLM with attention pooling
of rank one a head; `gru` the same pooling over a bidirectional GRU that starts from nothing. All are trained by
`Trainer` and load with plain `AutoModelForSequenceClassification`. `--data` is a folder with
`glue/sst2/{train,validation}.jsonl`; `--smoke` runs tiny random models on made-up sentences.
"""

import argparse
import os
import tempfile
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks import made_up
from benchmarks.tasks import DATA, Classification, train
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from hf_lowrank import LamaConfig, LamaForSequenceClassification, LinformerConfig, LinformerForSequenceClassification


RATES = {"linformer": 1e-4, "lama": 5e-5, "gru": 2e-3}
STEPS = {"linformer": 200, "lama": 200, "gru": 1500}


def linformer(task, smoke):
    """The encoder of `task` with projections in its attention."""
    sizes = AutoConfig.from_pretrained(task.where).to_dict()
    sizes = {key: value for key, value in sizes.items() if key not in ("architectures", "model_type")}
    # The start that leaves short sentences as the encoder knows them.
    options = {"projected_length": 8 if smoke else 32, "sharing": "headwise", "projection_start": "strided"}
    config = LinformerConfig(**sizes, **options, num_labels=2)
    return LinformerForSequenceClassification.from_pretrained(task.where, config=config)


def lama(task, smoke):
    """The encoder of `task`, pooled by attention with the mean of the sentence as context."""
    return LamaForSequenceClassification.from_encoder(task.where, num_heads=4, context="mean", num_labels=2)


def gru(task, smoke):
    """A recurrent encoder from nothing, for the same tokens."""
    sizes = {"embedding_size": 64, "hidden_size": 32} if smoke else {"embedding_size": 128, "hidden_size": 128}
    size = {"vocab_size": len(task.tokenizer), "pad_token_id": task.tokenizer.pad_token_id}
    return LamaForSequenceClassification(LamaConfig(**size, **sizes, num_heads=4, context="mean", num_labels=2))


MODELS = {"linformer": linformer, "lama": lama, "gru": gru}


def main():
    """Train, and say how good the model is before and after it went through a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="linformer", choices=list(MODELS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, help="batches of 32 sentences; by default what suits the model")
    parser.add_argument("--learning-rate", type=float, help="by default what suits the model")
    parser.add_argument("--output", help="where to save the model; by default it is thrown away")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        where, rate = None, asked.learning_rate or RATES[asked.model]
        if asked.smoke:
            where, asked.data = made_up.encoder(f"{folder}/model"), made_up.sentiment(folder)
            asked.steps, rate = asked.steps or 60, 5e-3
        steps = asked.steps or STEPS[asked.model]
        task = Classification("sst2", asked.data, where=where)
        model = MODELS[asked.model](task, asked.smoke)
        print(f"{asked.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
        train(task, model, rate, seed=0, steps=steps, folder=folder)
        accuracy = task.score(model)
        print(f"after {steps} batches: accuracy {accuracy:.3f}")
        output = asked.output or f"{folder}/trained"
        model.save_pretrained(output)
        task.tokenizer.save_pretrained(output)
        again = AutoModelForSequenceClassification.from_pretrained(output).eval()
        batch = task.batches(1, 1, labels=False)[0]
        with torch.no_grad():
            difference = (again(**batch).logits - model(**batch).logits).abs().max().item()
        print(f"loaded again: accuracy {task.score(again):.3f}, largest difference of a logit {difference:.1e}")
        # Kernels may sum in an order that depends on where tensors lie in memory.
        if difference > 1e-5:
            raise SystemExit("the reloaded model differs from the one that was saved")


if __name__ == "__main__":
    main()
