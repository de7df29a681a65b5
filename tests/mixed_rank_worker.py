"""Run by training/test_mixed_rank.py: trains a tiny model with mixed-rank layers, in one process or under torchrun."""

import os
import sys

import peft
import torch
from callback_worker import DEFAULTS, Kill, examples, leave
from transformers import TrainingArguments

from hf_lowrank import LowRankConfig, MixedRankCallback, MixedRankConfig, MixedRankTrainer, factorize
from hf_lowrank.testing import tiny_model


STEPS = 8


def make(folder, consistency=1.0, anneal_steps=6, callbacks=(), steps=STEPS, config=None, base="dense", **options):
    """A trainer in mid-annealing for most of its steps; all randomness is Trainer's, or the draws'."""
    model, _ = tiny_model("llama")
    if base == "factorized":
        factorize(model, LowRankConfig("svd", 0.6))
    config = MixedRankConfig(target_modules=["q_proj", "v_proj", "up_proj"]) if config is None else config
    model = peft.get_peft_model(model, config)
    arguments = TrainingArguments(str(folder), **(DEFAULTS | {"max_steps": steps} | options))
    annealing = MixedRankCallback(probability=0.9, anneal_steps=anneal_steps, seed=5)
    return MixedRankTrainer(
        model, arguments, train_dataset=examples(), consistency_weight=consistency, callbacks=[annealing, *callbacks]
    )


def main(folder, kill, resume, consistency, accumulate, base):
    trainer = make(
        folder, float(consistency), base=base, callbacks=[Kill(int(kill))], save_strategy="steps", save_steps=2,
        gradient_accumulation_steps=int(accumulate),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume == "resume")
    rank = os.environ.get("RANK", "0")
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    torch.save(trainer.model.state_dict(), f"{folder}/state_{rank}.pt")
    leave(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
