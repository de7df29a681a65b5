import os


# Before transformers or huggingface_hub are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


torch.set_num_threads(int(os.environ.get("HF_LOWRANK_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
