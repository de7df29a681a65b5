"""Sums over several partitions: Kronecker products are a rank, residuals fall, joint sweeps never cost."""

import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import (
    Terms,
    fit_level,
    merge_modes,
    middle_factors,
    multi_resolution,
    split_modes,
    truncated_svd,
)
from hf_lowrank.testing import make_weight


MATRIX, KRONECKER, SINGLE = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]


def residuals(tensor, levels):
    """The relative error after each level."""
    rest, found = tensor, []
    for level in levels:
        rest = rest if level is None else rest - level.product(tensor.shape)
        found.append(float(rest.norm() / tensor.norm()))
    return found


@pytest.mark.parametrize(("number", "pair"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (768, (24, 32))])
def test_middle_factors(number, pair):
    assert middle_factors(number) == pair


@pytest.mark.parametrize("partition", [MATRIX, KRONECKER, SINGLE, [[3, 0], [2], [1]]])
def test_merging_is_undone(partition):
    tensor = torch.randn(2, 3, 4, 5)
    merged = merge_modes(tensor, partition)
    assert merged.ndim == len(partition)
    assert torch.equal(split_modes(merged, partition, tensor.shape), tensor)


def test_a_kronecker_product_has_rank_one():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    tensor = torch.kron(a, b).view(3, 5, 4, 2)
    merged = merge_modes(tensor, KRONECKER)
    torch.testing.assert_close(merged, torch.outer(a.flatten(), b.flatten()))
    assert torch.linalg.matrix_rank(tensor.reshape(15, 8)) == 3 * 2, "as a matrix, the product of both ranks"
    level = fit_level(tensor, KRONECKER, 1)
    torch.testing.assert_close(level.product(tensor.shape), tensor, rtol=0, atol=1e-12)


def test_a_sum_of_kronecker_products_is_best_by_the_svd_of_its_rearrangement():
    weight = make_weight(15, 8)
    tensor = weight.view(3, 5, 4, 2)
    energies = torch.linalg.svdvals(merge_modes(tensor, KRONECKER)).square()
    for rank in (1, 4, 10):
        left = tensor - fit_level(tensor, KRONECKER, rank).product(tensor.shape)
        torch.testing.assert_close(left.square().sum(), energies[rank:].sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["coarse_to_fine", "fine_to_coarse"])
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 4), (3, 0, 1), (5, 5, 0)])
def test_the_residual_never_rises(order, ranks):
    tensor = make_weight(24, 30, decay=0.95).view(4, 6, 5, 6)
    levels = multi_resolution(tensor, [MATRIX, KRONECKER, SINGLE], ranks, order)
    assert [level is None for level in levels] == [rank == 0 for rank in ranks]
    errors = residuals(tensor, levels if order == "coarse_to_fine" else levels[::-1])
    assert all(later <= earlier for earlier, later in zip([1.0, *errors], errors, strict=False))
    numbers = sum(factor.numel() for level in levels if level is not None for factor in level.factors)
    assert numbers == ranks[0] * (24 + 30) + ranks[1] * (20 + 36) + ranks[2] * (4 + 6 + 5 + 6)


@pytest.mark.parametrize("order", ["coarse_to_fine", "fine_to_coarse"])
def test_joint_sweeps_are_never_worse(order):
    tensor = make_weight(24, 30, decay=0.97, seed=5).view(4, 6, 5, 6)
    errors = [
        residuals(tensor, multi_resolution(tensor, [MATRIX, KRONECKER, SINGLE], (4, 3, 6), order, joint))[-1]
        for joint in range(5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.999 * errors[0]


def test_structure_of_both_kinds_is_found_together_only():
    """A few singular vectors plus a Kronecker product: at these ranks exact, for which one level alone needs many."""
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    low = 3 * make_weight(24, 30, decay=0.5)
    left, right, _ = truncated_svd(low, 2)
    tensor = (left @ right + 0.02 * torch.kron(a, b)).view(4, 6, 5, 6)
    both = multi_resolution(tensor, [MATRIX, KRONECKER], (2, 1), joint_sweeps=200)
    assert residuals(tensor, both)[-1] < 1e-6
    # 2 (24 + 30) + 20 + 36 numbers are three singular vectors and a little.
    alone = multi_resolution(tensor, [MATRIX], (4,))
    assert residuals(tensor, alone)[-1] > 0.01


def test_terms_add_like_a_matrix():
    tensor = make_weight(12, 20).view(3, 4, 4, 5)
    terms = Terms([fit_level(tensor, KRONECKER, 2), fit_level(tensor, SINGLE, 3)], tensor.shape)
    matrix = torch.ones(12, 20, dtype=torch.float64)
    assert torch.equal(matrix + terms, matrix + terms.to_dense())
    assert torch.equal(matrix - terms, matrix - terms.to_dense())


def test_seeds_and_refusals():
    tensor = torch.randn(3, 4, 5, 2)
    one, again, other = (multi_resolution(tensor, [MATRIX, SINGLE], (1, 2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one[1].factors[0], again[1].factors[0])
    assert not torch.equal(one[1].factors[0], other[1].factors[0])
    tensor[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="The tensor holds 1 NaN"):
        multi_resolution(tensor, [MATRIX], (1,))
