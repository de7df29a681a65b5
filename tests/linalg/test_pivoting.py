import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import row_basis
from hf_lowrank.linalg.pivoting import BOUND


def check(left):
    pivots, others, coefficients = row_basis(left)
    assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(len(left)))
    assert torch.equal(pivots, pivots.sort().values)
    assert torch.equal(others, others.sort().values)
    assert coefficients.numel() == 0 or coefficients.abs().max() <= BOUND + 1e-9
    error = (left[others] - coefficients @ left[pivots]).norm()
    assert error <= 1e-11 * left.norm()


@pytest.mark.parametrize(("rows", "rank"), [(40, 8), (40, 39), (40, 40), (40, 1), (1, 1), (300, 120)])
@pytest.mark.parametrize("condition", [1, 1e6, 1e14])
def test_rows_follow_from_the_basis_with_small_coefficients(rows, rank, condition):
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    check(left * torch.logspace(0, -torch.tensor(float(condition)).log10(), rank, dtype=torch.float64))


def test_the_matrix_on_which_partial_pivoting_alone_grows_exponentially():
    # Wilkinson's example: its LU factor is bounded by one, its inverse by 2^(r - 1).
    rank = 30
    left = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    left = torch.cat([left, -torch.ones(20, rank, dtype=torch.float64)])
    check(left)


@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_fewer_independent_rows_than_asked_for(true_rank):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, true_rank, generator=generator, dtype=torch.float64) @ torch.randn(
        true_rank, 10, generator=generator, dtype=torch.float64
    )
    check(left)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    left = torch.randn(16, 8, dtype=torch.float64)
    left[3, 2] = value
    with pytest.raises(NonFiniteError, match="left factor holds 1 NaN or infinite"):
        row_basis(left)


def test_same_input_same_choice():
    left = torch.randn(50, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(row_basis(left), row_basis(left.clone()), strict=True):
        assert torch.equal(one, other)
