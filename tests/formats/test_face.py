import copy
import pickle

import pytest
import torch
from torch import nn

from hf_lowrank import FORMATS, ComputedWeightError
from hf_lowrank.formats import put_face_on, take_face_off
from hf_lowrank.methods import Factors
from hf_lowrank.testing import make_weight


@pytest.fixture(params=FORMATS.names())
def layer(request):
    weight = make_weight(6, 9).float()
    factors = Factors(weight[:, :3].double(), make_weight(3, 9), 0.0)
    return FORMATS[request.param].from_factors(factors, torch.ones(6), torch.float32, transposed=True)


def test_a_linear_layer_for_a_while(layer):
    kind, state, dense = type(layer), dict(layer.named_parameters()), layer.dense_weight()
    put_face_on(layer)
    put_face_on(layer)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, kind)
    assert layer.weight.shape == (6, 9), "whatever the layout of the layer that was replaced"
    assert torch.equal(layer.weight + 0, dense)
    assert all(parameter is state[name] for name, parameter in layer.named_parameters())
    take_face_off(layer)
    take_face_off(layer)
    assert type(layer) is kind
    assert layer.weight.shape == (9, 6)


def test_its_own_weight_and_bias_may_be_assigned_and_no_other(layer):
    put_face_on(layer)
    bias, x = layer.bias, torch.randn(2, 9)
    before = layer(x)
    layer.weight, layer.bias = layer.weight, layer.bias
    assert layer.bias is bias
    assert torch.equal(layer(x), before)
    with pytest.raises(ComputedWeightError, match="Assigning `weight` would write into the computed weight"):
        layer.weight = nn.Parameter(torch.zeros(6, 9))
    with pytest.raises(ComputedWeightError, match="`bias` of a factorized layer cannot be assigned|is not supported"):
        layer.bias = nn.Parameter(torch.zeros(6))


def test_copied_and_pickled_with_it(layer):
    put_face_on(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(twin, nn.Linear)
        assert all(torch.equal(one, other) for one, other in zip(twin.parameters(), layer.parameters(), strict=True))
        take_face_off(twin)
        assert type(twin) is FORMATS[layer.name]
        assert isinstance(layer, nn.Linear)


def test_freezing_the_weight_freezes_the_factors(layer):
    layer.weight.requires_grad = False
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {layer.bias_name}
