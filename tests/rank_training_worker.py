"""Run by training/test_processes.py: trains a tiny model under each callback that finds ranks or rests factors.

rank_training_worker.py FOLDER            alone: whole, and killed and gone on with, each in a forked process
torchrun ... rank_training_worker.py FOLDER both    one whole run a callback, over all processes
"""

import os
import signal
import sys

import torch
from callback_worker import DEFAULTS, Kill, examples, leave
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import LowRankConfig, TensorTrainLinear, factorize
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import (
    BasisSelectionCallback,
    DimensionSqueezingCallback,
    MaestroCallback,
    MaestroTrainer,
    SequentialFreezingCallback,
)
from hf_lowrank.training.dimension_squeezing import live_bonds


class Note(TrainerCallback):
    """Notes what a step leaves: the draw of a truncated layer, and what is zero or frozen."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {}
        for name, module in model.named_modules():
            if getattr(module, "open_components", None) is not None:
                found[name] = int(module.open_components.sum())
            if hasattr(module, "scale"):
                found[name] = int((module.scale != 0).sum())
            if name.endswith((".left", ".right")) and not module.weight.requires_grad:
                found[name] = "rests"
            if isinstance(module, TensorTrainLinear):
                found[name] = live_bonds(module)
        self.steps.append(found)


def make(setup, folder, callbacks=(), kind=None, callback=None, model=None, **options):
    """A trainer of a tiny model: `maestro`, `full_pass`, `basis`, `squeezing` or `freezing`."""
    model = tiny_model("llama")[0] if model is None else model
    targets = ["q_proj", "up_proj", "down_proj"]
    more = {}
    if setup in ("maestro", "full_pass"):
        kind = kind or MaestroTrainer
        callback = callback or MaestroCallback(
            threshold=2.0, shrink_every=3, target_modules=targets, final_prune=False, seed=5,
            sampler="single_layer" if setup == "maestro" else "independent",
        )  # fmt: skip
        more = {"lasso_weight": 1e-3, "full_pass": setup == "full_pass"} if kind is MaestroTrainer else {}
    elif setup == "basis":
        callback = callback or BasisSelectionCallback(
            keep_mass=0.3, extra_rank=4, pruning_steps=3, importance="taylor2", rank_multiple=4, target_modules=targets
        )
    elif setup == "squeezing":
        callback = callback or DimensionSqueezingCallback(max_gap=0.5, period=2, step=2, squeezes=2)
        if not any(isinstance(module, TensorTrainLinear) for module in model.modules()):
            factorize(model, LowRankConfig(method="tensor_train", rank=12, target_modules=targets))
    else:
        callback = callback or SequentialFreezingCallback(period=3)
        model = factorize(model, LowRankConfig(method="svd", rank=8, target_modules=targets))
    arguments = TrainingArguments(str(folder), **(DEFAULTS | {"weight_decay": 0.1} | options))
    return (kind or Trainer)(model, arguments, train_dataset=examples(), callbacks=[callback, *callbacks], **more)


SETUPS = ("maestro", "full_pass", "basis", "squeezing", "freezing")


def train(setup, folder, resume=False, kill=-1, **options):
    """The trainer after one run, whose last state and notes are in `folder`."""
    note = Note()
    trainer = make(setup, folder, [note, Kill(kill)], **options)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    found = {"state": trainer.model.state_dict(), "steps": note.steps}
    torch.save(found, f"{folder}/end_{os.environ.get('RANK', '0')}.pt")
    return trainer


def forked(*args, **kwargs):
    """The signal or the exit code that ends `train` in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(*args, **kwargs)
            code = 0
        finally:
            # No farewell of the parent's libraries.
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder, both=None):
    if both:
        leave(*(train(setup, f"{folder}/{setup}") for setup in SETUPS))
        return
    for setup in SETUPS:
        often = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
        assert forked(setup, f"{folder}/{setup}/whole", **often) == 0
        assert forked(setup, f"{folder}/{setup}/killed", kill=5, **often) == -signal.SIGKILL
        assert not os.path.exists(f"{folder}/{setup}/killed/end_0.pt")
        assert forked(setup, f"{folder}/{setup}/killed", resume=True, **often) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
