"""Run by training/test_sltrain.py: pre-trains a tiny model, in one process or under torchrun."""

import os
import signal
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import LowRankConfig, factorize
from hf_lowrank.testing import tiny_model


STEPS = 6


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


def build(seed=0, **options):
    """A new model, without anything of another one but its shape."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_model("llama")[0].config)
    method = {"name": "sltrain", "density": 0.05, **options}
    return factorize(model, LowRankConfig(method=method, rank=4, seed=seed))


def make(folder, model, callbacks=(), **options):
    """A plain trainer."""
    defaults = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "use_cpu": True, "dataloader_pin_memory": False,
        "logging_strategy": "no", "weight_decay": 0.0,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(defaults | options))
    return Trainer(model, arguments, train_dataset=examples(), callbacks=list(callbacks))


def main(folder, kill, resume):
    # Where the checkpoint says what the model is, another seed must not matter.
    model = build(seed=9 if resume == "resume" else 0)
    trainer = make(folder, model, [Kill(int(kill))], save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=resume == "resume")
    rank = os.environ.get("RANK", "0")
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    torch.save(trainer.model.state_dict(), f"{folder}/state_{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
