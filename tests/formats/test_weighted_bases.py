import pytest
import torch
from torch import nn

from hf_lowrank import CheckpointError, LowRankConfig, WeightedBasesLinear, factorize, to_dense, truncate
from hf_lowrank.methods import Factors
from hf_lowrank.testing import make_weight, tiny_model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_scales_are_roots_of_singular_values():
    weight = make_weight(12, 8)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    layer = WeightedBasesLinear.from_factors(Factors(u[:, :5] * s[:5], v[:5], 0.0), dtype=torch.float64)
    torch.testing.assert_close(layer.scale.data, s[:5].sqrt())
    torch.testing.assert_close(layer.left.weight.data, u[:, :5])
    torch.testing.assert_close(layer.right.weight.data, v[:5])


def test_added_bases_are_zero_to_begin_with():
    layer = WeightedBasesLinear(8, 12, 4)
    x = torch.randn(3, 8)
    before = layer(x)
    layer.add_bases(200, torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), before)
    assert abs(float(layer.added_right.weight.detach().var()) * 200 - 1) < 0.1
    assert layer.spec() == {"format": "weighted_bases", "rank": 4, "extra_rank": 200}
    stored = sum(tensor.numel() for name, tensor in layer.state_dict().items() if name != "left.bias")
    assert stored == WeightedBasesLinear.cost(12, 8, 4, extra_rank=200)


@pytest.mark.parametrize("extra", [-1, 9, "2", True])
def test_a_damaged_checkpoint_is_refused(extra):
    with pytest.raises(CheckpointError, match=r"`extra_rank`=.* must be an integer in 0..8"):
        WeightedBasesLinear.from_spec({"rank": 4, "extra_rank": extra}, 8, 12, False)


@pytest.mark.parametrize("make", [to_dense, lambda model: truncate(model, format="low_rank") and model])
def test_bases_that_are_out_and_added_ones_multiply_out(make):
    model, inputs = tiny_model("llama")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, format="weighted_bases"))
    generator = torch.Generator().manual_seed(0)
    for layer in [module for module in model.modules() if isinstance(module, WeightedBasesLinear)]:
        layer.add_bases(3, generator)
        nn.init.normal_(layer.added_left.weight, std=0.02)
        layer.scale.data[2] = 0
        left, right = layer.factors()
        assert left.shape[1] == layer.scale.numel() - 1 + 3
        torch.testing.assert_close((left @ right).float(), layer.dense_weight())
    expected = logits(model, inputs())
    torch.testing.assert_close(logits(make(model), inputs()), expected, rtol=0, atol=1e-5)
