import pytest
import torch
from torch import nn

from hf_lowrank import LowRankLinear, RankError


def test_children_are_ordinary_linears_in_the_fixed_order():
    layer = LowRankLinear(6, 5, 2)
    assert [name for name, _ in layer.named_children()] == ["right", "left"]
    assert all(type(child) is nn.Linear for child in layer.children())
    assert layer.right.bias is None
    assert layer.bias is layer.left.bias


@pytest.mark.parametrize("rank", [0, 6, -1, 2.0, True])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(RankError, match=r"must be an integer in 1\.\.5 = min\(out, in\) of its 5 x 6 weight"):
        LowRankLinear(6, 5, rank)


def test_weight_costs_nothing_to_look_at_and_trains_nothing():
    layer = LowRankLinear(4096, 4096, 2, device="meta")
    assert layer.weight.shape == (4096, 4096)
    assert "weight" not in dict(layer.named_parameters())


def test_rank_follows_the_weights():
    layer = LowRankLinear(6, 5, 4)
    layer.right.weight = nn.Parameter(layer.right.weight[:3])
    layer.left.weight = nn.Parameter(layer.left.weight[:, :3])
    assert layer.rank == 3
    assert layer.spec() == {"format": "low_rank", "rank": 3}
    layer(torch.randn(2, 6))
