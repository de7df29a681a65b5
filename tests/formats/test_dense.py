"""An ordinary linear with a description: the laws of formats, and an update that changes no size."""

import warnings

import pytest
import torch

from hf_lowrank import DenseLinear, LowRankConfig, UnknownNameError
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_laws_of_formats(shape):
    check_format(DenseLinear, *shape)


def test_it_holds_any_weight_and_does_not_grow():
    layer = DenseLinear.from_factors(Factors(make_weight(12, 3), make_weight(3, 10), 0.1), torch.ones(12))
    layer.replaced_shape = 12, 20
    weight = layer.dense_weight().detach().double() + make_weight(12, 10, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        absorb(layer, weight, updates=[(make_weight(12, 10, seed=3), torch.eye(10, dtype=torch.float64))])
    torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=0, atol=1e-6)
    assert layer.replaced_shape == (12, 20)
    filled, bias = layer.replacement()
    assert torch.equal(filled[:, :10], layer.dense_weight())
    assert not filled[:, 10:].any()
    assert bias is layer.bias


def test_no_factors_are_stored_so():
    with pytest.raises(UnknownNameError, match="format 'dense' cannot be chosen; choose one of"):
        LowRankConfig(format="dense")
