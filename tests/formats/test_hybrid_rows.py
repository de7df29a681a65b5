"""Free rows beside others of low rank: counted as in the paper, in any order, and updates leave rows free."""

import pytest
import torch
from torch import nn

from hf_lowrank import CheckpointError, HybridRowsLinear, LowRankLinear
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


def factors(rows=24, columns=40, rank=8, lower_rank=2, chosen=None, rows_first=False, weight=None):
    """The rows `chosen` of `weight` as they are, and a truncated SVD of the others."""
    weight = make_weight(rows, columns) if weight is None else weight
    lower_rank = min(lower_rank, rank)
    free = rank - lower_rank
    if chosen is None:
        chosen = torch.arange(free) if rows_first else torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    own = torch.zeros(rows, dtype=torch.bool).index_fill(0, chosen[:free], True)
    u, s, v = torch.linalg.svd(weight[~own], full_matrices=False)
    left = torch.zeros(rows, rank, dtype=torch.float64)
    left[own, torch.arange(free)] = 1
    left[~own, free:] = u[:, :lower_rank] * s[:lower_rank]
    layout = {"lower_rank": lower_rank} | ({"rows_first": True} if rows_first else {})
    return Factors(left, torch.cat([weight[own], v[:lower_rank]]), 0.1, layout=layout)


@pytest.mark.parametrize("rows_first", [False, True])
def test_the_laws_of_formats(rows_first):
    def make(rows, columns, rank):
        # The suite wants the whole weight at full rank: of 24 rows, 22 are free and two have a rank of two.
        return factors(rows, columns, rank, rows_first=rows_first)

    check_format(HybridRowsLinear, 24, 40, 8, make=make)


@pytest.mark.parametrize(("size", "times", "rank", "factors_rank"), [(2048, 2, 1023, 512), (2048, 4, 511, 256)])
def test_ranks_of_the_paper_at_equal_numbers(size, times, rank, factors_rank):
    """j n + (m - j) + n numbers for a rank of j + 1: about twice the rank of two factors."""
    free = rank - 1
    numbers = HybridRowsLinear.cost(size, size, rank, lower_rank=1, rows_first=True)
    assert numbers == free * size + (size - free) + size
    assert numbers <= size * size / times < HybridRowsLinear.cost(size, size, rank + 1, lower_rank=1, rows_first=True)
    assert LowRankLinear.cost(size, size, factors_rank) == size * size / times


def test_the_order_is_counted_in_its_own_bytes():
    numbers = 6 * 40 + 2 * (18 + 40)
    assert HybridRowsLinear.cost(24, 40, 8, lower_rank=2) == numbers + 24
    assert HybridRowsLinear.stored_bytes(24, 40, 8, 2, lower_rank=2) == 2 * numbers + 4 * 24
    assert HybridRowsLinear.stored_bytes(24, 40, 8, 2, lower_rank=2, rows_first=True) == 2 * numbers
    assert HybridRowsLinear.stored_bytes(24, 40, 8, 2) == 2 * 8 * (24 + 40), "two factors"


def test_rows_come_back_in_their_places():
    chosen = torch.tensor([3, 11, 4, 20, 0, 23])
    layer = HybridRowsLinear.from_factors(factors(chosen=chosen), dtype=torch.float64)
    weight = make_weight(24, 40)
    torch.testing.assert_close(layer.dense_weight()[chosen], weight[chosen], rtol=0, atol=0)
    others = [row for row in range(24) if row not in chosen]
    assert torch.linalg.matrix_rank(layer.dense_weight()[others]) == 2
    assert torch.linalg.matrix_rank(layer.dense_weight()) == layer.rank == 8
    assert {name: type(child) for name, child in layer.named_children()} == dict.fromkeys(
        ("rows", "right", "left"), nn.Linear
    )
    assert layer.spec() == {"format": "hybrid_rows", "rank": 8, "lower_rank": 2}


def test_updates_raise_the_rank_of_the_others_and_rows_stay_free():
    found = factors()
    layer = HybridRowsLinear.from_factors(found, torch.zeros(24), torch.float64)
    pair = make_weight(24, 3, seed=7), make_weight(3, 40, seed=8)
    weight = found.product() + pair[0] @ pair[1]
    absorb(layer, weight, updates=[pair])
    assert (layer.rank, layer.lower_rank) == (11, 5)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)
    scaled = torch.linspace(0.5, 2, 24, dtype=torch.float64)[:, None] * weight
    absorb(layer, scaled)
    assert (layer.rank, layer.lower_rank) == (11, 5), "scaled rows are still free"
    torch.testing.assert_close(layer.dense_weight().detach(), scaled, rtol=0, atol=1e-12)


def test_any_pair_of_factors_is_held():
    weight = make_weight(24, 40)
    absorbed = HybridRowsLinear.from_factors(factors(), None, torch.float64)
    with pytest.warns(UserWarning, match="have grown to the size of dense ones"):
        absorb(absorbed, weight)
    torch.testing.assert_close(absorbed.dense_weight().detach(), weight, rtol=0, atol=1e-12)
    # All columns with a row of their own: one of them has to serve as the rank of the others.
    diagonal = Factors(torch.eye(24, 5, dtype=torch.float64), weight[:5], 0.0)
    layer = HybridRowsLinear.from_factors(diagonal, dtype=torch.float64)
    assert (layer.rank, layer.lower_rank) == (5, 1)
    torch.testing.assert_close(layer.dense_weight(), diagonal.product(), rtol=0, atol=0)
    # Two columns with the same row.
    twice = Factors(torch.eye(24, 5, dtype=torch.float64)[:, [0, 0, 1, 2]], weight[:4], 0.0)
    layer = HybridRowsLinear.from_factors(twice, dtype=torch.float64)
    assert (layer.rank, layer.lower_rank) == (4, 1)
    torch.testing.assert_close(layer.dense_weight(), twice.product(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("entry", "value"), [("lower_rank", 0), ("lower_rank", 9), ("lower_rank", True), ("rows_first", 1)]
)
def test_a_damaged_spec_is_refused(entry, value):
    spec = {"format": "hybrid_rows", "rank": 8, "lower_rank": 2, entry: value}
    with pytest.raises(CheckpointError, match=f"`{entry}`={value!r} of a hybrid_rows layer must be"):
        HybridRowsLinear.from_spec(spec, 40, 24, True)
