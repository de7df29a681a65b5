"""Run by training/test_sltrain.py: pre-trains a tiny model, in one process or under torchrun."""

import os
import sys

import torch
from callback_worker import Kill, leave, make
from transformers import AutoModelForCausalLM

from hf_lowrank import LowRankConfig, factorize
from hf_lowrank.testing import tiny_model


def build(seed=0, **options):
    """A new model, without anything of another one but its shape."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_model("llama")[0].config)
    method = {"name": "sltrain", "density": 0.05, **options}
    return factorize(model, LowRankConfig(method=method, rank=4, seed=seed))


def main(folder, kill, resume):
    # Where the checkpoint says what the model is, another seed must not matter.
    model = build(seed=9 if resume == "resume" else 0)
    trainer = make(folder, Kill(int(kill)), model=model, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    trainer.train(resume_from_checkpoint=resume == "resume")
    rank = os.environ.get("RANK", "0")
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    torch.save(trainer.model.state_dict(), f"{folder}/state_{rank}.pt")
    leave(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
