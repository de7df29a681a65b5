"""Run by training/test_mixed_rank.py: trains a tiny model with mixed-rank layers, in one process or under torchrun."""

import os
import signal
import sys

import peft
import torch
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank import MixedRankCallback, MixedRankConfig, MixedRankTrainer
from hf_lowrank.testing import tiny_model


STEPS = 8


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


def make(folder, consistency=1.0, anneal_steps=6, callbacks=(), steps=STEPS, config=None, **options):
    """A trainer in mid-annealing for most of its steps; all randomness is Trainer's, or the draws'."""
    model, _ = tiny_model("llama")
    config = MixedRankConfig(target_modules=["q_proj", "v_proj", "up_proj"]) if config is None else config
    model = peft.get_peft_model(model, config)
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "use_cpu": True, "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(defaults | options))
    annealing = MixedRankCallback(probability=0.9, anneal_steps=anneal_steps, seed=5)
    return MixedRankTrainer(
        model, arguments, train_dataset=examples(), consistency_weight=consistency, callbacks=[annealing, *callbacks]
    )


def main(folder, kill, resume, consistency, accumulate):
    trainer = make(
        folder, float(consistency), callbacks=[Kill(int(kill))], save_strategy="steps", save_steps=2,
        gradient_accumulation_steps=int(accumulate),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume == "resume")
    rank = os.environ.get("RANK", "0")
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    torch.save(trainer.model.state_dict(), f"{folder}/state_{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
