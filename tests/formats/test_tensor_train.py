"""Cores and modes: the same map by every route, the cheapest of them taken, and nothing stored that is not counted."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank import CheckpointError, RankError, TensorTrainLinear
from hf_lowrank.formats._train_product import Route, _envelope, apply_train, routes
from hf_lowrank.linalg import full_bonds
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


# With padding on both sides.
OUT, IN = [2, 3, 4], [3, 7, 2]
WAYS = [(0, 1, 2), ((0, 1), 2), (0, (1, 2)), ((0, (1, 2)),), (((0, 1), 2),)]
LAYOUT = {"out_shape": OUT, "in_shape": IN, "bonds": [5, 6]}


def factors(rows, columns, rank):
    """At full rank the whole weight; of lower ranks, whatever its train of such bonds is."""
    shapes = {24: [2, 3, 4], 40: [3, 7, 2]}
    layout = {"out_shape": shapes[rows], "in_shape": shapes[columns]}
    full = full_bonds(*layout.values())
    bonds = full if rank == min(rows, columns) else [min(rank, bond) for bond in full]
    layout["bonds"] = list(bonds)
    unit = torch.eye(columns, dtype=torch.float64)
    whole = Factors(make_weight(rows, columns), unit, 0.1, layout=layout)
    exact = TensorTrainLinear.from_factors(whole, dtype=torch.float64)
    cores = tuple(core.detach() for core in exact.cores)
    return Factors(exact.exact_weight(), unit, 0.1, layout=layout, cores=cores)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_laws_of_formats_with_modes(shape):
    check_format(TensorTrainLinear, *shape, make=factors)


def train(bonds=(5, 6), dtype=torch.float64, out_features=23, in_features=40):
    layer = TensorTrainLinear(in_features, out_features, 1, out_shape=OUT, in_shape=IN, bonds=list(bonds), dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


@pytest.mark.parametrize("groups", WAYS, ids=str)
@pytest.mark.parametrize("from_left", [False, True])
def test_every_route_gives_the_same(groups, from_left):
    layer, x = train(), torch.randn(3, 5, 40, dtype=torch.float64)
    table = ((1, Route(groups, from_left, 0, 0)),)
    expected = x @ layer.dense_weight().T
    for some in (x, x[0, 0], x[:0], x.transpose(0, 1)):
        found = apply_train(some, layer.cores, table, 23)
        torch.testing.assert_close(found, some @ layer.dense_weight().T)
    assert found.shape == expected.transpose(0, 1).shape


def counted(layer, tokens):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(tokens, layer.in_features, dtype=layer.core_0.dtype))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("bonds", [(1, 1), (2, 3), (5, 6), (6, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 10, 100, 3000])
def test_no_way_through_the_chain_takes_fewer_multiplications(bonds, tokens):
    layer = train(bonds)
    spent = []
    for groups, from_left in itertools.product(WAYS, [False, True]):
        layer._routes = ((1, Route(groups, from_left, 0, 0)),)
        spent.append(counted(layer, tokens))
    layer._set_bonds(bonds)
    assert counted(layer, tokens) == min(spent)


def test_the_count_is_the_one_that_was_announced_and_never_above_that_of_the_matrix():
    for out_shape, in_shape, bonds in (
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16)),
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (8, 40, 40, 8)),
        ((4, 6, 4), (4, 6, 6), (10, 12)),
    ):
        rows, columns = (torch.tensor(shape).prod().item() for shape in (out_shape, in_shape))
        table = routes(rows, columns, out_shape, in_shape, bonds)
        assert [start for start, _ in table] == sorted({start for start, _ in table})
        assert [route.each for _, route in table] == sorted((route.each for _, route in table), reverse=True)
        assert table[-1][1].each <= rows * columns
        layer = TensorTrainLinear(columns, rows, 1, out_shape=out_shape, in_shape=in_shape, bonds=bonds)
        for start, route in table:
            if start * rows < 1e5:
                assert counted(layer, start) == route.fixed + start * route.each
    # Generation goes through the chain where a long text goes through the matrix.
    wide = routes(768, 3072, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16))
    assert len(wide) > 1
    assert len(wide[-1][1].groups) == 1
    assert len(wide[0][1].groups) > 1


def test_each_route_is_taken_where_it_is_the_best():
    found = [Route((0,), False, fixed, each) for fixed, each in ((100, 1), (0, 60), (10, 20), (95, 2), (500, 1))]
    table = _envelope(found)
    assert table[0][0] == 1
    for tokens in range(1, 200):
        route = next(route for start, route in reversed(table) if tokens >= start)
        assert route.fixed + tokens * route.each == min(other.fixed + tokens * other.each for other in found)


def test_exported_and_compiled_for_any_number_of_tokens():
    layer, x = train((6, 8), torch.float32), torch.randn(7, 40)
    assert len(layer._routes) > 1
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=9000)},))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (2, 50, 3000):
        y = torch.randn(tokens, 40)
        expected = y @ layer.dense_weight().T + layer.output_bias
        torch.testing.assert_close(program.module()(y), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(compiled(y), expected, rtol=1e-4, atol=1e-3)


def test_gradients_are_those_of_the_matrix():
    layer, x = train(), torch.randn(4, 40, dtype=torch.float64)
    weights = torch.randn(4, 23, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    ((x @ layer.dense_weight().T + layer.output_bias) * weights).sum().backward()
    for one, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_autocast():
    layer, x = train(dtype=torch.float32), torch.randn(4, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    expected = layer(x)
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_two_factors_are_a_train():
    pair = make_weight(12, 3), make_weight(3, 10)
    layer = TensorTrainLinear.from_factors(Factors(*pair, 0.0), dtype=torch.float64)
    assert layer.spec() == {"format": "tensor_train", "rank": 3}
    assert [tuple(core.shape) for core in layer.cores] == [(1, 12, 1, 3), (3, 1, 10, 1)]
    assert all(torch.equal(one, other) for one, other in zip(layer.factors(), pair, strict=True))


def test_what_is_merged_into_a_chain_makes_two_factors_of_it():
    layer = train(dtype=torch.float64)
    weight = layer.dense_weight().detach() + make_weight(23, 40)
    with pytest.warns(UserWarning, match="grown to the size of dense ones"):
        absorb(layer, weight)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-9)
    assert layer.out_shape == (23, 1)


def test_the_central_core_is_the_largest():
    layer = train()
    sizes = [parameter.numel() for parameter in (layer.core_0, layer.core_1, layer.core_2)]
    assert sizes == [30, 630, 48]
    assert layer.central == 1
    assert [parameter.numel() for parameter in layer.auxiliary()] == [30, 48]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_shape": [2, 3, 3]}, r"`out_shape`=\[2, 3, 3\] of a train for a 23 x 40 weight .* product is 23"),
        ({"in_shape": [3, 7, 4]}, r"`in_shape`=\[3, 7, 4\] .* below 80"),
        ({"out_shape": None}, "`out_shape`=None"),
        ({"in_shape": [40, 1]}, "must have one length"),
        ({"bonds": [5]}, "the bonds one less"),
        ({"bonds": [5, 0]}, "must have one length"),
        ({"bonds": [True, 6]}, "must have one length"),
        ({"bonds": [7, 6]}, r"Bonds \[7, 6\] of a train are more than a core of 2 x 3 between 1 and 7 can fill"),
        ({"bonds": [5, 9]}, "they are at most"),
        ({"out_shape": [2**40, 2**40, 2**40]}, "below 46"),
        ({"out_shape": [1] * 8 + [24], "in_shape": [1] * 8 + [42], "bonds": [1] * 8}, "must be 2 to 8 integers"),
    ],
)  # fmt: skip
def test_a_damaged_spec_is_refused_before_memory_is_taken(change, message):
    spec = {"format": "tensor_train", "rank": 6, **LAYOUT, **change}
    with pytest.raises(CheckpointError, match=f"{message}.*The checkpoint may be damaged: download or save it again"):
        TensorTrainLinear.from_spec(spec, 40, 23, True)


def test_a_rank_without_shapes_is_one_of_two_factors():
    for rank in (0, 24, None, "3"):
        with pytest.raises(RankError, match=r"must be an integer in 1..23"):
            TensorTrainLinear.from_spec({"format": "tensor_train", "rank": rank}, 40, 23, True)
