"""A hub over HTTP and a process that uses it, for the tests that push and pull."""

import pytest
from hub import Hub
from processes import Worker


SETUP = """
import torch
import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.testing import tiny_model
from transformers import AutoModelForCausalLM

load = AutoModelForCausalLM.from_pretrained

def small(rank=4, base="org/base"):
    return load(base, lowrank_config=LowRankConfig(method="svd", rank=rank))

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 10)[None]).logits

tiny_model("llama")[0].push_to_hub("org/base")
model = small()
"""
BASE_README = "---\nlicense: other\nlicense_name: some\nlicense_link: LICENSE\nlanguage:\n- en\n---\n# Base\n"


@pytest.fixture(scope="session")
def hub():
    with Hub() as hub:
        hub.put("org/base", {"README.md": BASE_README})
        yield hub


@pytest.fixture(scope="session")
def pushing(hub, tmp_path_factory):
    with Worker(**hub.environment(tmp_path_factory.mktemp("home"))) as worker:
        worker.run(SETUP)
        yield worker


@pytest.fixture
def worker(hub, pushing):
    """A process with a factorized `model`; of the hub it finds `org/base` and nothing else."""
    for name in set(hub.repositories) - {"org/base"}:
        del hub.repositories[name]
    hub.requests.clear()
    hub.faults.clear()
    return pushing
