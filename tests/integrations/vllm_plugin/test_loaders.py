"""Layers whose outputs vLLM cuts or reorders in its own way while it loads them."""

import pytest
import torch

from hf_lowrank.formats import FORMATS
from hf_lowrank.integrations.vllm.pieces import FORMATS as SERVED
from hf_lowrank.methods import Factors


IN, OUT, RANK = 12, 24, 5
X = torch.randn(3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def factorized(format, out=OUT):
    left, right = torch.randn(out, RANK, dtype=torch.float64), torch.randn(RANK, IN, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    return FORMATS[format].from_factors(Factors(left, right, 0.0), bias, dtype=torch.float64)


def layer_for(vllm, cls, *sizes, module, packed=None, **options):
    name = packed or "m.a"
    described = {"quant_method": "lowrank", "version": 1, "recipe": {}, "modules": {name: module.spec()}}
    served = vllm.CONFIGS["lowrank"].from_config(described)
    return cls(*sizes, quant_config=served, prefix=name, params_dtype=torch.float64, **options)


def load(layer, module, change=lambda door, tensor: tensor):
    for name, tensor in module.state_dict().items():
        door = layer.get_parameter(name)
        door.weight_loader(door, change(door, tensor))
    layer.quant_method.process_weights_after_loading(layer)
    return layer(X)[0]


def interleaved(outputs, heads):
    """GPT-NeoX and BLOOM keep queries, keys and values of one head together; vLLM wants those of all heads."""

    def change(door, tensor):
        dimension = getattr(door, "output_dim", None)
        if dimension is None:
            return tensor
        shape = tensor.shape
        parts = tensor.view(*shape[:dimension], heads, 3, -1, *shape[dimension + 1 :])
        return parts.transpose(dimension, dimension + 1).reshape(shape)

    return change


@pytest.mark.parametrize("format", SERVED)
def test_a_model_class_that_reorders_what_has_outputs(vllm, format):
    module = factorized(format)
    layer = layer_for(vllm, vllm.QKVParallelLinear, IN, 4, 2, module=module)
    y = load(layer, module, interleaved(OUT, heads=2))
    expected = module(X).view(3, 2, 3, 4).transpose(1, 2).reshape(3, OUT)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("format", SERVED)
@pytest.mark.parametrize("size", [1, 2])
def test_a_projection_that_is_fused_in_the_checkpoint(vllm, format, size):
    module, parts = factorized(format), []
    for rank in range(size):
        with vllm.rank_of(rank, size):
            layer = layer_for(vllm, vllm.MergedColumnParallelLinear, IN, [16, 8], module=module)
        parts.append(load(layer, module).split([16 // size, 8 // size], -1))
    y = torch.cat([part[i] for i in range(2) for part in parts], -1)
    torch.testing.assert_close(y, module(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("format", SERVED)
def test_layers_that_are_not_fused(vllm, format):
    module = factorized(format)
    for cls in (vllm.ReplicatedLinear, vllm.ColumnParallelLinear, vllm.RowParallelLinear):
        torch.testing.assert_close(load(layer_for(vllm, cls, IN, OUT, module=module), module), module(X))


def test_pivots_first_and_of_full_rank(vllm):
    left, right = torch.randn(RANK, RANK, dtype=torch.float64), torch.randn(RANK, IN, dtype=torch.float64)
    module = FORMATS["pivoted"].from_factors(Factors(left, right, 0.0), dtype=torch.float64)
    module.order = None
    layer = layer_for(vllm, vllm.ReplicatedLinear, IN, RANK, False, module=module)
    torch.testing.assert_close(load(layer, module), module(X))


def test_tensors_may_come_in_any_order_and_may_be_reused_by_whoever_reads_them(vllm):
    module = factorized("pivoted")
    layer = layer_for(vllm, vllm.ReplicatedLinear, IN, OUT, module=module)
    for name in ("output_bias", "coefficients.weight", "basis.weight", "order"):
        door, tensor = layer.get_parameter(name), module.state_dict()[name].clone()
        door.weight_loader(door, tensor)
        tensor.zero_()
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer(X)[0], module(X))


def test_whatever_the_default_device_is(vllm):
    module = factorized("pivoted")
    layer = layer_for(vllm, vllm.RowParallelLinear, IN, OUT, module=module)
    with torch.device("meta"):
        for name, tensor in module.state_dict().items():
            layer.get_parameter(name).weight_loader(layer.get_parameter(name), tensor)
        layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer(X)[0], module(X))


def test_finishing_twice_changes_nothing(vllm):
    module = factorized("low_rank")
    layer = layer_for(vllm, vllm.ReplicatedLinear, IN, OUT, module=module)
    y = load(layer, module)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer(X)[0], y)


def test_half_precision_stays_what_it_is(vllm):
    module = factorized("pivoted")
    described = {"quant_method": "lowrank", "version": 1, "modules": {"m.a": module.spec()}}
    served = vllm.CONFIGS["lowrank"].from_config(described)
    layer = vllm.ReplicatedLinear(IN, OUT, quant_config=served, prefix="m.a", params_dtype=torch.bfloat16)
    module.to(torch.bfloat16)
    for name, tensor in module.state_dict().items():
        layer.get_parameter(name).weight_loader(layer.get_parameter(name), tensor)
    layer.quant_method.process_weights_after_loading(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    y = layer(X.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, module(X.bfloat16()))
