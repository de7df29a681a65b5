import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import truncated_svd
from hf_lowrank.testing import make_weight


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 9), (9, 1)])
def test_eckart_young_error_is_the_tail_energy(shape):
    weight = make_weight(*shape)
    for rank in range(1, min(shape) + 1):
        left, right, energies = truncated_svd(weight, rank)
        error = (weight - left @ right).square().sum()
        torch.testing.assert_close(error, energies[rank:].sum(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(energies, torch.linalg.svdvals(weight) ** 2, rtol=1e-8, atol=1e-14)


def test_error_is_invariant_under_orthogonal_maps():
    weight = make_weight(20, 30)
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    torch.testing.assert_close(truncated_svd(weight, 5)[2], truncated_svd(weight @ rotation, 5)[2])


def test_signs_do_not_depend_on_the_sign_of_the_solver():
    weight = make_weight(20, 30)
    left = truncated_svd(weight, 5)[0]
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted(bad):
    weight = make_weight(20, 30)
    weight[3, 4] = bad
    weight[5, 6] = bad
    with pytest.raises(NonFiniteError, match=r"holds 2 NaN or infinite value\(s\) of 600"):
        truncated_svd(weight, 3)


def test_a_sum_that_overflows_is_not_mistaken_for_infinity():
    weight = torch.full((2, 3), 2e38)
    from hf_lowrank.linalg import require_finite

    require_finite(weight, "The weight")
