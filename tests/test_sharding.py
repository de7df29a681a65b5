"""Weights of which a process holds a part only are refused, by name."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hf_lowrank import TargetError
from hf_lowrank.sharding import refuse_fsdp, refuse_sharded


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_zero_3():
    whole, split = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    refuse_sharded({"a": whole})
    split.ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split b,.*use DistributedDataParallel"):
        refuse_sharded({"a": whole, "b": split})


def test_fsdp(one_process):
    model = nn.Sequential(nn.Linear(4, 4))
    refuse_fsdp(model, "these")
    refuse_sharded(dict(model.named_parameters()), "these")
    split = fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(TargetError, match="0.weight is a DTensor.*these need whole weights"):
        refuse_sharded(dict(split.named_parameters()), "these")
    flat = nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    with pytest.raises(TargetError, match="FSDP has flattened.*Sequential.*these need whole weights"):
        refuse_fsdp(flat, "these")
