"""Every mode has its basis: exact at full ranks, energies that add up, and of a matrix the SVD."""

import math

import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import hosvd, truncated_svd, tucker_tensor
from hf_lowrank.testing import make_weight


STACK = make_weight(3 * 10, 14, decay=0.9).view(3, 10, 14)


def test_full_ranks_are_exact():
    core, bases = hosvd(STACK, STACK.shape)
    torch.testing.assert_close(tucker_tensor(core, bases), STACK, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 10, 4), (2, 5, 6), (1, 1, 1)])
def test_the_error_is_the_energy_that_the_core_lacks(ranks):
    core, bases = hosvd(STACK, ranks)
    assert core.shape == ranks
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    error = (STACK - tucker_tensor(core, bases)).square().sum()
    torch.testing.assert_close(error, STACK.square().sum() - core.square().sum(), rtol=1e-9, atol=1e-12)
    unfoldings = [torch.linalg.svdvals(STACK.movedim(mode, 0).flatten(1)) for mode in range(3)]
    tails = [values[rank:].square().sum() for values, rank in zip(unfoldings, ranks, strict=True)]
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)


def test_slices_of_the_full_core_are_orthogonal():
    core, _ = hosvd(STACK, STACK.shape)
    for mode in range(3):
        slices = core.movedim(mode, 0).flatten(1)
        gram = slices @ slices.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_of_a_matrix_it_is_the_svd_and_the_core_is_diagonal(shape):
    weight = make_weight(*shape)
    core, (rows, columns) = hosvd(weight, (4, 4))
    torch.testing.assert_close(core, rows.T @ weight @ columns)
    torch.testing.assert_close(core.abs(), torch.linalg.svdvals(weight)[:4].diag(), rtol=0, atol=1e-10)
    left, right, _ = truncated_svd(weight, 4)
    torch.testing.assert_close(rows @ core @ columns.T, left @ right, rtol=0, atol=1e-10)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="The weight holds 1 NaN"):
        hosvd(
            STACK.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan).double()),
            (1, 1, 1),
        )
