import pytest
import torch
from torch import nn

from hf_lowrank import CheckpointError
from hf_lowrank.formats import FORMATS
from hf_lowrank.formats.pivoted import PivotedLinear
from hf_lowrank.linalg import balanced, truncated_svd
from hf_lowrank.methods import Factors
from hf_lowrank.testing import make_weight


def factors(rows, columns, rank, decay=0.98):
    weight = make_weight(rows, columns, decay=decay)
    return weight, Factors(*balanced(*truncated_svd(weight, rank)[:2]), 0.0)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 48), (64, 96, 40), (64, 64, 64), (96, 64, 64)])
def test_the_same_matrix_as_two_factors(rows, columns, rank):
    _, pair = factors(rows, columns, rank)
    layer = PivotedLinear.from_factors(pair, dtype=torch.float64)
    torch.testing.assert_close(layer.dense_weight(), pair.left @ pair.right, rtol=0, atol=1e-12)
    stored = sum(t.numel() for t in layer.state_dict().values())
    assert stored == rank * (rows + columns - rank) + rows


def test_rows_of_the_basis_are_rows_of_the_weight():
    _, pair = factors(30, 20, 7)
    layer = PivotedLinear.from_factors(pair, dtype=torch.float64)
    order = layer.order.tolist()
    product = pair.left @ pair.right
    for position in range(7):
        torch.testing.assert_close(layer.basis.weight[position], product[order.index(position)])


@pytest.mark.parametrize(("rows", "columns"), [(192, 128), (128, 192), (160, 160)])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_half_precision_loses_nothing_that_matters(rows, columns, ratio):
    weight, pair = factors(rows, columns, int(ratio * min(rows, columns)))
    optimal = (weight - pair.left @ pair.right).norm()
    layer = PivotedLinear.from_factors(pair, dtype=torch.bfloat16)
    exact = torch.cat([layer.basis.weight.double(), layer.coefficients.weight.double() @ layer.basis.weight.double()])
    assert (weight - exact[layer.order.long()]).norm() <= 1.002 * optimal


def test_below_full_rank_it_is_smaller_than_dense_and_than_two_factors():
    for rank in (16, 32, 55):
        assert PivotedLinear.cost(64, 64, rank) < 64 * 64
        assert PivotedLinear.cost(64, 64, rank) < FORMATS["low_rank"].cost(64, 64, rank)


def test_children_are_ordinary_linears_and_the_order_is_no_parameter():
    layer = PivotedLinear(6, 5, 2)
    assert {name: type(child) for name, child in layer.named_children()} == {
        "basis": nn.Linear,
        "coefficients": nn.Linear,
    }
    assert {name for name, _ in layer.named_parameters()} == {"basis.weight", "coefficients.weight", "output_bias"}
    assert layer.order.dtype == torch.int32


def test_casting_leaves_the_order_alone():
    _, pair = factors(64, 32, 8)
    layer = PivotedLinear.from_factors(pair, dtype=torch.float32).to(torch.bfloat16)
    assert layer.order.dtype == torch.int32
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def without_order(layer):
    spec = {**layer.spec(), "pivots_first": True}
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    again = PivotedLinear.from_spec(spec, *shape, dtype=layer.basis.weight.dtype)
    again.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "order"}, strict=True)
    return again


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 24, dtype=torch.float64)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_pivots_first_is_the_same_map_before_the_gather(rank, bias):
    _, pair = factors(24, 40, rank)
    layer = PivotedLinear.from_factors(pair, bias, dtype=torch.float64)
    bare = without_order(layer)
    x = torch.randn(3, 5, 40, dtype=torch.float64)
    added = 0 if bias is None else bias
    torch.testing.assert_close((bare(x) - added)[..., layer.order.long()] + added, layer(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(bare(x), x @ bare.dense_weight().T + added, rtol=1e-13, atol=1e-13)
    assert torch.equal(torch.compile(bare, fullgraph=True, backend="eager")(x), bare(x))


def test_pivots_first_is_said_by_the_spec_and_stores_no_order():
    layer = PivotedLinear(6, 5, 2)
    assert "pivots_first" not in layer.spec()
    assert not layer.pivots_first
    bare = without_order(layer)
    assert bare.spec() == {"format": "pivoted", "rank": 2, "pivots_first": True}
    assert set(bare.state_dict()) == {"basis.weight", "coefficients.weight", "output_bias"}


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_damaged_spec_is_refused(value):
    with pytest.raises(CheckpointError, match="pivots_first.*true or false"):
        PivotedLinear.from_spec({"format": "pivoted", "rank": 2, "pivots_first": value}, 6, 5, True)
