"""Terms over merged modes: applied without their matrix where that is cheaper, and never another result."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank import CheckpointError, MultiResolutionLinear
from hf_lowrank.linalg import Level, Terms
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


KRONECKER = [["o1", "i1"], ["o2", "i2"]]
VECTORS = [["o1"], ["o2"], ["i1"], ["i2"]]
MIXED = [["o1", "i1", "i2"], ["o2"]]
SIZES = {(24, 40): (4, 6, 8, 5), (40, 24): (5, 8, 6, 4), (32, 32): (4, 8, 8, 4)}


def factors(rows=24, columns=40, rank=3, levels=((KRONECKER, 2),), weight=None):
    """Random terms, and beside them a truncated SVD, of what they leave of `weight` if that is given."""
    sizes = SIZES[rows, columns]
    generator = torch.Generator().manual_seed(rank)
    found = []
    for partition, terms in levels:
        blocks = [[("o1", "o2", "i1", "i2").index(mode) for mode in block] for block in partition]
        lengths = [torch.tensor([sizes[mode] for mode in block]).prod() for block in blocks]
        found.append(
            Level(blocks, [torch.randn(terms, n, generator=generator, dtype=torch.float64) / n for n in lengths])
        )
    rest = Terms(found, sizes) if found else None
    target = make_weight(rows, columns, seed=7) if weight is None else weight
    u, s, v = torch.linalg.svd(target - rest if found and weight is not None else target, full_matrices=False)
    layout = {"sizes": list(sizes), "levels": [{"partition": p, "terms": t} for p, t in levels]} if levels else {}
    return Factors(u[:, :rank] * s[:rank], v[:rank], 0.1, rest=rest, layout=layout)


@pytest.mark.parametrize(
    "levels",
    [((KRONECKER, 2),), ((VECTORS, 3), (MIXED, 2)), ((KRONECKER, 20), (VECTORS, 5), (KRONECKER, 1))],
    ids=["kronecker", "vectors", "three"],
)
def test_the_laws_of_formats(levels):
    def make(rows, columns, rank):
        return factors(rows, columns, rank, levels, weight=make_weight(rows, columns))

    check_format(MultiResolutionLinear, 24, 40, 8, make=make)


def multiplications(layer, rows=7):
    x = torch.randn(rows, layer.in_features, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() / 2 / rows


def test_a_kronecker_product_is_applied_by_reshaping():
    """(A kron B) x = vec(A X B^T): out i1 + in o2 multiplications a term, or with the other factor first."""
    o1, o2, i1, i2 = SIZES[24, 40]
    found = [multiplications(MultiResolutionLinear.from_factors(factors(levels=((KRONECKER, t),)))) for t in (1, 2)]
    two_factors = 3 * (24 + 40)
    first = min(i1 * i2 * o1 + o1 * i2 * o2, i1 * i2 * o2 + o2 * i1 * o1)
    assert [count - two_factors for count in found] == [first, 2 * first]
    assert first < 24 * 40


def test_outer_products_are_applied_one_mode_after_the_other():
    layer = MultiResolutionLinear.from_factors(factors(levels=((VECTORS, 4),)))
    assert multiplications(layer) - 3 * 64 < 4 * (40 + 8 + 4 + 24) + 1


def test_levels_that_cost_more_than_their_matrix_are_formed():
    found = factors(levels=((KRONECKER, 12), (KRONECKER, 9)))
    layer = MultiResolutionLinear.from_factors(found)
    formed = 21 * 24 * 40 / 7
    assert multiplications(layer) == pytest.approx(3 * 64 + 24 * 40 + formed)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ found.product().T, rtol=1e-12, atol=1e-12)


def test_numbers_are_those_of_the_paper():
    """sum_l R_l sum_b prod_{k in b} I_k."""
    layout = factors(levels=((KRONECKER, 2), (VECTORS, 3))).layout
    expected = 3 * (24 + 40) + 2 * (4 * 8 + 6 * 5) + 3 * (4 + 6 + 8 + 5)
    assert MultiResolutionLinear.cost(24, 40, 3, **layout) == expected
    assert MultiResolutionLinear.stored_bytes(24, 40, 3, 2, **layout) == 2 * expected


def test_updates_are_appended_to_the_two_factors_and_levels_stay():
    found = factors(levels=((KRONECKER, 2), (VECTORS, 3)))
    layer = MultiResolutionLinear.from_factors(found, torch.zeros(24), torch.float64)
    before = layer.level_2.detach().clone()
    pair = make_weight(24, 2, seed=7), make_weight(2, 40, seed=8)
    weight = found.product() + pair[0] @ pair[1]
    absorb(layer, weight, updates=[pair])
    assert (layer.rank, [level["terms"] for level in layer.levels]) == (5, [2, 3])
    assert torch.equal(layer.level_2, before)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)


def test_scaled_rows_are_held_by_the_two_factors():
    found = factors(levels=((KRONECKER, 1),))
    layer = MultiResolutionLinear.from_factors(found, None, torch.float64)
    weight = torch.linspace(0.5, 2, 24, dtype=torch.float64)[:, None] * found.product()
    with pytest.warns(UserWarning, match="have grown to the size of dense ones"):
        absorb(layer, weight)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"levels": 3}, "`levels`=3 of a multi_resolution layer must be a list of up to 3"),
        ({"levels": [{"partition": KRONECKER, "terms": 1}] * 4}, "must be a list of up to 3"),
        ({"sizes": [4, 6, 8, 4]}, r"`sizes`=\[4, 6, 8, 4\] .* with o1 o2 = 24 and i1 i2 = 40"),
        ({"sizes": None}, "`sizes`=None"),
        ({"levels": [{"partition": [["o1"], ["o2", "i1"]], "terms": 1}]}, "needs a `partition` of"),
        ({"levels": [{"partition": [["o1", "o2", "i1", "i2"]], "terms": 1}]}, "into two blocks or more"),
        ({"levels": [{"partition": [["o1", 2], ["i1", "i2"]], "terms": 1}]}, "needs a `partition` of"),
        ({"levels": ["kronecker"]}, "needs a `partition` of"),
        ({"levels": [{"partition": KRONECKER, "terms": True}]}, r"`terms`=True .* integer in 1..30"),
        ({"levels": [{"partition": KRONECKER, "terms": 31}]}, r"`terms`=31 .* integer in 1..30"),
        ({"levels": [{"partition": KRONECKER}]}, "`terms`=None"),
    ],
)
def test_a_damaged_spec_is_refused(entry, match):
    spec = {"format": "multi_resolution", "rank": 3, "sizes": [4, 6, 8, 5]}
    spec |= {"levels": [{"partition": KRONECKER, "terms": 2}], **entry}
    with pytest.raises(CheckpointError, match=match):
        MultiResolutionLinear.from_spec(spec, 40, 24, True)
