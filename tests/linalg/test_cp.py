"""Outer products by alternating least squares: exact where it can be, never worse, the same every time."""

import math

import pytest
import torch

from hf_lowrank import ConfigError, NonFiniteError
from hf_lowrank.linalg import cp_als, cp_product, truncated_svd
from hf_lowrank.testing import make_weight


def terms(rank, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rank, size, generator=generator, dtype=torch.float64) for size in sizes]


def error(tensor, factors):
    return float((tensor - cp_product(factors)).norm() / tensor.norm())


@pytest.mark.parametrize("sizes", [(5, 7), (5, 7, 6), (3, 4, 5, 2), (2, 3, 2, 3, 2)])
def test_the_product_is_the_sum_of_outer_products(sizes):
    factors = terms(3, *sizes)
    letters = "abcde"[: len(sizes)]
    equation = ",".join(f"r{letter}" for letter in letters) + "->" + letters
    torch.testing.assert_close(cp_product(factors), torch.einsum(equation, *factors))


@pytest.mark.parametrize("sizes", [(9, 7), (6, 7, 8), (4, 5, 6, 5)])
def test_a_tensor_of_that_rank_is_found(sizes):
    tensor = cp_product(terms(2, *sizes, seed=3))
    assert error(tensor, cp_als(tensor, 2, tolerance=1e-12, sweeps=2000)) < 1e-6


def test_each_step_is_the_least_squares_solution():
    """At a fixed point no factor can be changed alone: the gradient is zero."""
    tensor = cp_product(terms(3, 5, 6, 7)) + 0.1 * torch.randn(5, 6, 7, dtype=torch.float64)
    found = [f.requires_grad_() for f in cp_als(tensor, 3, tolerance=1e-14, sweeps=1000)]
    (tensor - cp_product(found)).square().sum().backward()
    assert all(f.grad.norm() < 1e-4 * tensor.norm() for f in found)


def test_more_sweeps_never_cost_and_a_start_is_never_left_for_a_worse_one():
    tensor = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    errors = [error(tensor, cp_als(tensor, 4, tolerance=0, sweeps=sweeps)) for sweeps in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1, "the zero tensor"
    start = cp_als(tensor, 4, tolerance=1e-14, sweeps=300)
    assert error(tensor, cp_als(tensor, 4, start=start, sweeps=1)) <= error(tensor, start)


def test_two_modes_come_to_the_truncated_svd():
    weight = make_weight(12, 9, decay=0.6)
    left, right, _ = truncated_svd(weight, 3)
    found = cp_product(cp_als(weight, 3, tolerance=1e-14, sweeps=500))
    torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-6)


def test_more_terms_than_the_tensor_has():
    tensor = cp_product(terms(1, 4, 5, 6))
    found = cp_als(tensor, 6)
    assert error(tensor, found) < 1e-6
    assert all(torch.isfinite(f).all() for f in found)
    assert all(not f.any() for f in cp_als(torch.zeros(3, 4, 5), 2))
    norms = torch.stack([f.norm(dim=1) for f in found])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), msg="terms have vectors of one norm")


def test_seeds_and_refusals():
    tensor = torch.randn(4, 5, 6)
    one, again, other = (cp_als(tensor, 2, seed=seed, sweeps=3) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    tensor[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="The tensor holds 1 NaN"):
        cp_als(tensor, 2)
    with pytest.raises(ConfigError, match="has 1 modes, and needs two"):
        cp_als(torch.ones(3), 1)
