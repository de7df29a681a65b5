import pytest
import torch

from hf_lowrank import LowRankConfig, collect_statistics
from hf_lowrank.testing import tiny_model


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """`dense(architecture)`: the folder of a tiny model in several files; not to be written to."""
    made = {}

    def save(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture)[0].to(dtype).save_pretrained(folder, max_shard_size="60KB")
            made[architecture, dtype] = folder
        return made[architecture, dtype]

    return save


@pytest.fixture(scope="session")
def statistics(tmp_path_factory):
    """`statistics(architecture, method)`: a file of saved statistics."""
    made = {}

    def save(architecture, method):
        if (architecture, method) not in made:
            path = tmp_path_factory.mktemp("statistics") / f"{architecture}.safetensors"
            model, inputs = tiny_model(architecture)
            collect_statistics(model, [inputs()], method=method).save(path)
            made[architecture, method] = str(path)
        return made[architecture, method]

    return save


@pytest.fixture
def svd():
    """Data-free configurations."""
    return lambda **options: LowRankConfig(**{"method": "svd", "param_ratio": 0.5, **options})
