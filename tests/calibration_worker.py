"""Run by integrations/test_processes.py under torchrun: each process collects its share, and writes what it gets."""

import os
import sys

import torch
from accelerate import Accelerator
from words import TEXTS, word_tokenizer

from hf_lowrank import Calibration, collect_statistics
from hf_lowrank.testing import tiny_model


# A mixture of experts has layers that one process or the other never reaches.
METHODS = {"llama": ("kfac_svd", "feature_pca", "asvd", "fwsvd"), "mixtral": ("whitened_svd", "fwsvd")}


def batches():
    """Five batches of different sizes, one of them padded, with labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, length in ((2, 9), (1, 4), (3, 7), (2, 5), (1, 12)):
        ids = torch.randint(3, 90, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return made


def main(folder):
    accelerator = Accelerator(cpu=True)
    rank = os.environ["RANK"]
    for name, methods in METHODS.items():
        for method in methods:
            found = collect_statistics(tiny_model(name)[0], batches(), method=method, accelerator=accelerator)
            found.save(f"{folder}/{name}-{method}-{rank}.safetensors")
    own = Calibration(samples=5, length=8, batch_size=2)
    found = collect_statistics(tiny_model("llama")[0], own, method="whitened_svd", accelerator=accelerator)
    found.save(f"{folder}/self-{rank}.safetensors")
    both = Calibration(TEXTS, samples=7, length=8, batch_size=2, sampled=0.4)
    found = collect_statistics(
        tiny_model("llama")[0], both, word_tokenizer(), method="whitened_svd", accelerator=accelerator
    )
    found.save(f"{folder}/both-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
