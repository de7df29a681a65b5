"""Another weight in the same layer: exactly, in as few ranks as there are, or not at all."""

import pytest
import torch
from torch import nn

from hf_lowrank import FORMATS, ComputedWeightError, FormatLinear, LowRankLinear, NonFiniteError
from hf_lowrank.formats import as_parameter
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb, check_rewritable, restore, snapshot
from hf_lowrank.testing import make_weight


ROWS, COLUMNS = 12, 10


def make(name, dtype=torch.float64, rank=3):
    factors = Factors(make_weight(ROWS, rank), make_weight(rank, COLUMNS, seed=1), 0.1)
    return FORMATS[name].from_factors(factors, torch.ones(ROWS), dtype)


@pytest.fixture(params=FORMATS.names())
def layer(request):
    return make(request.param)


def update(rank, seed=5):
    return make_weight(ROWS, rank, seed=seed), make_weight(rank, COLUMNS, seed=seed + 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_updates_are_appended(layer, scaled):
    pairs = [update(2), update(1, seed=9)]
    scale = torch.linspace(-2, 2, ROWS, dtype=torch.float64)[:, None] if scaled else 1.0
    weight = scale * (layer.dense_weight().detach() + sum(b @ a for b, a in pairs))
    absorb(layer, weight, updates=pairs)
    assert layer.rank == 6
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)
    assert layer.relative_error is None


def test_updates_that_do_not_give_the_weight_are_not_believed(layer):
    weight = layer.dense_weight().detach() + torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    absorb(layer, weight, updates=[update(2)])
    assert layer.rank == 4
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_any_weight_at_its_numerical_rank(layer, rank, recwarn):
    weight = make_weight(ROWS, rank, seed=3) @ make_weight(rank, COLUMNS, seed=4)
    absorb(layer, weight, bias=torch.zeros(ROWS))
    assert layer.rank == rank
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)
    assert not layer.bias.any()
    warned = any("grown to the size" in str(entry.message) for entry in recwarn)
    assert warned == (rank >= layer.break_even(ROWS, COLUMNS))


@pytest.mark.parametrize("rank", [2, 10])
def test_undone_to_the_object(layer, rank):
    x, before, objects = torch.randn(2, COLUMNS, dtype=torch.float64), None, dict(layer.named_parameters())
    before, order = layer(x), getattr(layer, "order", None)
    saved = snapshot([layer])
    for size in (rank, 12 - rank, rank):
        absorb(layer, make_weight(ROWS, size, seed=3) @ make_weight(size, COLUMNS, seed=4))
    assert not torch.allclose(layer(x), before)
    restore(saved)
    assert dict(layer.named_parameters()).keys() == objects.keys()
    assert all(parameter is objects[name] for name, parameter in layer.named_parameters())
    assert getattr(layer, "order", None) is order
    assert torch.equal(layer(x), before)
    assert layer.relative_error == 0.1


def test_frozen_factors_stay_frozen(layer):
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == layer.bias_name)
    absorb(layer, layer.dense_weight().detach() + update(1)[0] @ update(1)[1], updates=[update(1)])
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {layer.bias_name}


def test_what_is_not_finite_in_the_layers_dtype_is_refused_with_the_layer_unchanged():
    layer = make("low_rank", torch.float16)
    before = dict(layer.named_parameters())
    for value in (float("inf"), 1e15):
        weight = layer.dense_weight().double().detach()
        weight[0, 0] = value
        with pytest.raises(NonFiniteError):
            absorb(layer, weight)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def test_factors_that_are_not_ordinary_linears_are_refused():
    layer = make("low_rank")
    layer.left.weight = nn.Parameter(torch.ones(ROWS, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ComputedWeightError, match="`left.weight` is of torch.int8; merge before the factors"):
        check_rewritable(layer)
    layer = make("low_rank").to("meta")
    with pytest.raises(ComputedWeightError, match="is offloaded"):
        check_rewritable(layer)
    layer = make("low_rank")
    layer.left = nn.ModuleDict({"base_layer": layer.left})
    with pytest.raises(ComputedWeightError, match="belongs to an adapter of the factor itself"):
        check_rewritable(layer)


def test_a_format_that_holds_only_some_weights(monkeypatch):
    """One that third parties might write: two factors of rank 1 at most, and no `factors` of its own."""

    class Narrow(LowRankLinear):
        name = "narrow"
        factors = FormatLinear.factors

        @classmethod
        def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
            return super().from_factors(Factors(factors.left[:, :1], factors.right[:1], 0.0), bias, dtype, transposed)

    monkeypatch.setitem(FORMATS._classes, "narrow", Narrow)
    layer = Narrow(COLUMNS, ROWS, 1, bias=False, dtype=torch.float64)
    layer.left.weight, layer.right.weight = (as_parameter(t, torch.float64) for t in update(1))
    left, right = layer.factors()
    assert left.shape == (ROWS, 1)
    torch.testing.assert_close(left @ right, layer.dense_weight().detach())
    absorb(layer, 2 * layer.dense_weight().detach())
    with pytest.raises(ComputedWeightError, match="The format 'narrow' cannot hold a given pair of factors exactly"):
        absorb(layer, layer.dense_weight().detach() + update(1, 7)[0] @ update(1, 7)[1])
