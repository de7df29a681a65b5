"""Two factors and single entries: gradients, what training keeps, and what is stored."""

import pytest
import torch

from hf_lowrank import CheckpointError, ConfigError, SparseLowRankLinear
from hf_lowrank.formats._sparse_product import SparseLowRankProduct, times
from hf_lowrank.linalg import sparse_matrix
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


ROWS, COLUMNS, RANK, NONZEROS = 24, 40, 8, 60


def sparse(rows=ROWS, columns=COLUMNS, count=NONZEROS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    return sparse_matrix(places, values, (rows, columns))


def factors(rows=ROWS, columns=COLUMNS, rank=RANK, count=NONZEROS, scaling=0.3):
    rest = sparse(rows, columns, count)
    u, s, v = torch.linalg.svd(make_weight(rows, columns) - rest, full_matrices=False)
    layout = {"nonzeros": count, "scaling": scaling}
    return Factors(u[:, :rank] * s[:rank], v[:rank], 0.1, rest=rest, layout=layout)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_laws_of_formats_with_entries(shape):
    check_format(SparseLowRankLinear, *shape, make=factors)


@pytest.fixture(params=[2, 100], ids=["few rows", "many rows"])
def parts(request):
    """x, left, right, values, indices, scaling; few rows are multiplied factor by factor, many by the whole matrix."""
    layer = SparseLowRankLinear.from_factors(factors(), dtype=torch.float64)
    x = torch.randn(request.param, 2, COLUMNS, dtype=torch.float64, requires_grad=True)
    return x, layer.left, layer.right, layer.values, layer.indices, layer.scaling


def reference(x, left, right, values, indices, scaling):
    entries = torch.zeros(ROWS * COLUMNS, dtype=values.dtype).scatter(0, indices.long(), values).view(ROWS, COLUMNS)
    return x @ (scaling * left @ right + entries).T


def test_gradients_are_those_of_the_dense_matrix(parts):
    expected, found = reference(*parts), SparseLowRankProduct.apply(*parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), parts[:4])
    given = torch.autograd.grad((found * weights).sum(), parts[:4])
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 9], ids=["few rows", "many rows"])
def test_gradcheck(rows):
    layer = SparseLowRankLinear.from_factors(factors(6, 8, 2, 5), dtype=torch.float64)
    inputs = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True), layer.left, layer.right, layer.values
    assert torch.autograd.gradcheck(lambda *tensors: SparseLowRankProduct.apply(*tensors, layer.indices, 0.3), inputs)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: SparseLowRankProduct.apply(*tensors, layer.indices, 0.3), inputs
    )


def test_frozen_parts_get_no_gradient_and_stop_none(parts):
    x, left, right, values, *others = parts
    left.requires_grad_(False)
    values.requires_grad_(False)
    SparseLowRankProduct.apply(x, left, right, values, *others).sum().backward()
    assert left.grad is None
    assert values.grad is None
    assert right.grad.any()
    assert x.grad.any()


def test_both_orders_give_the_same(parts):
    x = parts[0].detach()
    for transposed in (False, True):
        inputs = x if not transposed else x @ torch.randn(COLUMNS, ROWS, dtype=torch.float64)
        one = times(inputs, *parts[1:], transposed=transposed)
        every = torch.cat([times(row[None], *parts[1:], transposed=transposed) for row in inputs])
        torch.testing.assert_close(one, every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(COLUMNS,), (0, COLUMNS), (2, 0, COLUMNS)])
def test_single_and_empty_inputs(shape):
    layer = SparseLowRankLinear.from_factors(factors(), torch.ones(ROWS), torch.float64)
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.dense_weight().T + layer.bias)
    y.sum().backward()
    assert x.grad.shape == shape
    assert layer.left.grad.any() == bool(x.numel())


def saved_by(function):
    """Bytes of all that autograd keeps for the backward pass, each memory once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    output.sum().backward()
    return sum(kept.values())


def test_the_matrix_is_not_kept_from_forward_to_backward():
    rows, columns, rank = 96, 128, 8
    layer = SparseLowRankLinear.from_factors(factors(rows, columns, rank), torch.ones(rows), torch.float32)
    x = torch.randn(50, columns, requires_grad=True)
    own = rank * (rows + columns) * 4 + NONZEROS * (4 + 4)
    assert saved_by(lambda: layer(x)) == x.numel() * 4 + own
    tensors = layer.left, layer.right, layer.values, layer.indices

    def plain():
        entries = torch.zeros(rows * columns).scatter(0, tensors[3].long(), tensors[2]).view(rows, columns)
        return x @ (0.3 * tensors[0] @ tensors[1] + entries).T

    assert saved_by(plain) >= rows * columns * 4 + x.numel() * 4
    # Under autocast, copies in half precision stand in for inputs and parts.
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_by(lambda: layer(x)) == x.numel() * 2 + rank * (rows + columns) * 2 + NONZEROS * (2 + 4)


def test_autocast_trains_float32_parts():
    layer = SparseLowRankLinear.from_factors(factors(), torch.ones(ROWS), torch.float32)
    x = torch.randn(60, COLUMNS)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
    found.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


def test_training_compiles_without_a_break():
    layer, twin = (SparseLowRankLinear.from_factors(factors(), torch.ones(ROWS), torch.float64) for _ in range(2))
    x = torch.randn(70, COLUMNS, dtype=torch.float64)
    torch.compiler.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_indices_are_half_of_what_torch_would_take_and_no_parameters():
    layer = SparseLowRankLinear.from_factors(factors(), dtype=torch.bfloat16)
    assert layer.indices.dtype == torch.int32
    assert torch.equal(layer.indices, layer.indices.sort().values)
    assert {name for name, _ in layer.named_parameters()} == {"left", "right", "values"}
    assert layer.spec() == {"format": "sparse_low_rank", "rank": RANK, "nonzeros": NONZEROS, "scaling": 0.3}
    assert layer.to(torch.float32).indices.dtype == torch.int32


def test_without_entries_it_is_two_factors():
    layer = SparseLowRankLinear.from_factors(Factors(make_weight(6, 2), make_weight(2, 9), 0.0), dtype=torch.float64)
    assert set(layer.state_dict()) == {"left", "right"}
    assert layer.spec() == {"format": "sparse_low_rank", "rank": 2}
    assert layer.rest() is None


@pytest.mark.parametrize("scaled", [False, True])
def test_updates_are_appended_beside_the_entries(scaled):
    layer = SparseLowRankLinear.from_factors(factors(), dtype=torch.float64)
    before = layer.indices.clone()
    pair = make_weight(ROWS, 3, seed=7), make_weight(3, COLUMNS, seed=8)
    scale = torch.linspace(0, 2, ROWS, dtype=torch.float64)[:, None] if scaled else 1.0
    weight = scale * (layer.dense_weight().detach() + pair[0] @ pair[1])
    absorb(layer, weight, updates=[pair])
    assert layer.rank == RANK + 3
    assert torch.equal(layer.indices, before), "also where a row is scaled to nothing"
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-11)


def test_an_unknown_update_of_low_rank_keeps_the_entries():
    layer = SparseLowRankLinear.from_factors(factors(), dtype=torch.float64)
    weight = layer.dense_weight().detach() + make_weight(ROWS, 2, seed=7) @ make_weight(2, COLUMNS, seed=8)
    absorb(layer, weight)
    assert layer.rank == RANK + 2
    assert layer.nonzeros == NONZEROS
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("entry", "value"), [("nonzeros", -1), ("nonzeros", 55), ("nonzeros", 2.0), ("scaling", 0), ("scaling", "big")]
)
def test_a_damaged_spec_is_refused(entry, value):
    with pytest.raises(CheckpointError, match=f"`{entry}`={value!r} of a sparse_low_rank layer must be"):
        SparseLowRankLinear.from_spec({"format": "sparse_low_rank", "rank": 2, entry: value}, 6, 9, True)


def test_more_entries_than_int32_can_number_are_refused():
    with pytest.raises(ConfigError, match="65536 x 65536 has more entries than int32"):
        SparseLowRankLinear(2**16, 2**16, 1, nonzeros=1, device="meta")
    SparseLowRankLinear(2**16, 2**16, 1, device="meta")
