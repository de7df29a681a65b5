"""Run by tests of callbacks: trains a tiny model with one of them, in one process or under torchrun."""

import gc
import json
import os
import signal
import sys

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import training
from hf_lowrank.testing import tiny_model


STEPS = 8
DEFAULTS = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "seed": 0, "use_cpu": True, "dataloader_pin_memory": False,
    "logging_strategy": "no",
}  # fmt: skip


class Kill(TrainerCallback):
    """The power fails after `step` steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def examples(count=32):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (count, 12), generator=generator)]


def make(folder, *callbacks, model=None, **options):
    """A Trainer of a tiny language model."""
    model = tiny_model("llama")[0] if model is None else model
    arguments = TrainingArguments(str(folder), **(DEFAULTS | options))
    data = {"train_dataset": examples(), "eval_dataset": examples(4)}
    return Trainer(model, arguments, callbacks=list(callbacks), **data)


def leave(*trainers):
    """Ends the process group, if there is one, after all that holds on to it.

    Whoever lets the group go last joins gloo's threads. DistributedDataParallel's reducer would do so with the GIL
    held, and a thread that still owns a tensor of the last gather waits for the GIL: neither ends.
    """
    for trainer in trainers:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(folder, name, options, kill=-1, resume=False, **arguments):
    callback = getattr(training, name)(**options)
    trainer = make(folder, callback, Kill(kill), save_strategy="steps", save_steps=1, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    rank = os.environ.get("RANK", "0")
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    torch.save(trainer.model.state_dict(), f"{folder}/state_{rank}.pt")
    leave(trainer)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
