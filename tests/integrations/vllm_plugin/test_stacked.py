"""The tensor logic alone: pieces of our own modules, cut and stacked, against what these modules compute."""

import itertools

import pytest
import torch
from torch import nn

from hf_lowrank.formats import FORMATS
from hf_lowrank.formats.shared_basis import SharedBasisLinear
from hf_lowrank.integrations.vllm.pieces import CUTS, Piece, cut, make_piece
from hf_lowrank.integrations.vllm.pieces import FORMATS as SERVED
from hf_lowrank.integrations.vllm.stacked import StackedLinear
from hf_lowrank.methods import Factors


IN, RANK = 24, 5
X = torch.randn(7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PIVOTS_FIRST = "pivots first"
KINDS = ["low_rank", "shared_basis", "pivoted", PIVOTS_FIRST, "full rank", "dense"]


def module(kind, out=16):
    """A module of our own with random numbers, and what a checkpoint says of it."""
    left, right = torch.randn(out, RANK, dtype=torch.float64), torch.randn(RANK, IN, dtype=torch.float64)
    if kind == "dense":
        return nn.Linear(IN, out, bias=False, dtype=torch.float64), None
    if kind == "full rank":
        left, right = torch.randn(out, out, dtype=torch.float64), torch.randn(out, IN, dtype=torch.float64)
    name = "pivoted" if kind in (PIVOTS_FIRST, "full rank") else kind
    layer = FORMATS[name].from_factors(Factors(left, right, 0.0), dtype=torch.float64)
    if kind == PIVOTS_FIRST:
        layer.order = None
    return layer, layer.spec()


def pieces(layers, rows, columns=slice(0, IN)):
    found = []
    for layer, spec in layers:
        tensors = {leaf: cut(leaf, tensor, rows, columns) for leaf, tensor in layer.state_dict().items()}
        found.append(make_piece(spec, tensors, rows))
    return found


def stack(found):
    return StackedLinear(found)


def test_what_is_served_exists():
    assert set(SERVED) <= set(FORMATS.names())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [range(16), range(4, 8), range(12, 16), (3, 0, 15, 9)], ids=str)
def test_some_outputs_of_one_module(kind, rows):
    layer, spec = module(kind)
    rows = torch.tensor(rows)
    y = stack(pieces([(layer, spec)], rows))(X)
    torch.testing.assert_close(y, layer(X)[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_inputs_add_up(kind):
    layer, spec = module(kind)
    total = 0
    for start in range(0, IN, 6):
        columns = slice(start, start + 6)
        total = total + stack(pieces([(layer, spec)], torch.arange(16), columns))(X[:, columns])
    torch.testing.assert_close(total, layer(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=3)), ids="-".join)
def test_any_three_side_by_side(kinds):
    layers = [module(kind) for kind in kinds]
    rows, bias = torch.arange(8, 16), torch.randn(24, dtype=torch.float64)
    y = stack(pieces(layers, rows))(X[None], bias)
    expected = torch.cat([layer(X)[:, rows] for layer, _ in layers], dim=-1) + bias
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-12)


def products(stacked):
    return 1 + len(stacked.seconds)


def test_one_product_for_all_first_tables():
    rows = torch.arange(16)
    assert products(stack(pieces([module("low_rank"), module("low_rank")], rows))) == 3
    assert products(stack(pieces([module("dense"), module("low_rank")], rows))) == 2
    mixed = stack(pieces([module("low_rank"), module("dense"), module("pivoted")], rows))
    assert mixed.first.shape == (RANK + 16 + RANK, IN)
    assert [tuple(second.shape) for second in mixed.seconds] == [(16, RANK), (16 - RANK, RANK)]


def test_a_shared_basis_is_read_once_and_its_left_factors_are_one():
    basis = torch.randn(RANK, IN, dtype=torch.float64)
    lefts = [torch.randn(rows, RANK, dtype=torch.float64) for rows in (16, 4, 4)]
    stacked = stack([Piece(basis, left) for left in lefts])
    assert stacked.first.shape == basis.shape
    assert [tuple(second.shape) for second in stacked.seconds] == [(24, RANK)]
    torch.testing.assert_close(stacked(X), torch.cat([X @ basis.T @ left.T for left in lefts], 1), rtol=0, atol=1e-12)


def test_each_process_keeps_only_the_coefficients_of_its_own_outputs():
    layer, spec = module("pivoted", out=32)
    kept = [pieces([(layer, spec)], torch.arange(start, start + 8))[0].second for start in range(0, 32, 8)]
    assert sum(0 if second is None else len(second) for second in kept) == 32 - RANK


def test_pivoted_modules_take_no_more_numbers_than_in_the_checkpoint():
    layer, spec = module("pivoted")
    stacked = stack(pieces([(layer, spec)], torch.arange(16)))
    assert sum(p.numel() for p in stacked.parameters()) == sum(p.numel() for p in layer.parameters())
    assert not any(p.requires_grad for p in stacked.parameters())


@pytest.mark.parametrize("kinds", [("low_rank", "dense"), ("pivoted", "pivoted"), ("shared_basis",)], ids="-".join)
def test_compiles_into_one_graph_for_any_number_of_tokens(kinds):
    stacked = stack(pieces([module(kind) for kind in kinds], torch.arange(16)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stacked, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 7):
        torch.testing.assert_close(compiled(X[:tokens]), stacked(X[:tokens]))
    assert len(graphs) == 1


def test_a_lender_of_another_layer_is_no_different():
    lender, spec = module("shared_basis")
    borrower = SharedBasisLinear(IN, 12, RANK, bias=False, borrows=True, dtype=torch.float64)
    borrower.borrow(lender)
    tensors = {**borrower.state_dict(), "right.weight": lender.right.weight.data}
    piece = make_piece({**borrower.spec(), "basis": "x"}, tensors, torch.arange(12))
    torch.testing.assert_close(stack([piece])(X), borrower(X), rtol=0, atol=1e-12)


def test_every_tensor_of_every_format_has_its_cut():
    for kind in KINDS[:-1]:
        layer, _ = module(kind)
        layer_with_bias = type(layer)(IN, 16, RANK)
        assert {*layer.state_dict(), *layer_with_bias.state_dict()} <= set(CUTS)
