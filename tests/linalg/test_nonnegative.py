import sys

import pytest
import torch

from hf_lowrank import ConfigError, MissingPackageError, NonFiniteError
from hf_lowrank.linalg import nonnegative, semi_nonnegative
from hf_lowrank.testing.matrices import make_weight


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_semi_nonnegative_lies_between_svds_of_its_rank_and_of_one_less(shape):
    weight = make_weight(*shape)
    tails = torch.linalg.svdvals(weight).square().flip(0).cumsum(0).flip(0)
    for rank in (2, 5, 12, 24):
        left, right = semi_nonnegative(weight, rank)
        assert (right >= 0).all()
        error = (weight - left @ right).square().sum()
        assert error <= tails[rank - 1] * (1 + 1e-9)
        assert rank == 24 or error >= tails[rank] * (1 - 1e-9)
        left, right = semi_nonnegative(weight, rank, sweeps=0)
        error = (weight - left @ right).square().sum()
        torch.testing.assert_close(error, tails[rank - 1], rtol=1e-8, atol=1e-12)


def test_no_sweep_makes_semi_nonnegative_factors_worse():
    weight = make_weight(20, 30)
    errors = []
    for sweeps in range(8):
        left, right = semi_nonnegative(weight, 6, sweeps)
        errors.append(float((weight - left @ right).norm()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(errors, errors[1:], strict=False))


def test_a_product_of_semi_nonnegative_factors_is_found_again():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    right = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    found = semi_nonnegative(left @ right, 3, sweeps=300)
    assert ((left @ right) - found[0] @ found[1]).norm() / (left @ right).norm() < 1e-2


def test_nonnegative_factors_of_a_nonnegative_product():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(*s, generator=generator, dtype=torch.float64) for s in ((20, 3), (3, 30)))
    found = nonnegative(left @ right, 3, iterations=2000)
    assert all((factor >= 0).all() for factor in found)
    assert ((left @ right) - found[0] @ found[1]).norm() / (left @ right).norm() < 1e-3


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="negative entries"):
        nonnegative(-torch.ones(3, 4), 2)
    for solver in (nonnegative, semi_nonnegative):
        with pytest.raises(NonFiniteError):
            solver(torch.full((3, 4), float("nan")), 2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"pip install \"hf-lowrank\[nmf\]\""):
        nonnegative(torch.ones(3, 4), 2)
