import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import product_singular_values, randomized_svd, truncated_svd
from hf_lowrank.testing import make_weight


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 9), (9, 1)])
def test_eckart_young_error_is_the_tail_energy(shape):
    weight = make_weight(*shape)
    for rank in range(1, min(shape) + 1):
        left, right, energies = truncated_svd(weight, rank)
        error = (weight - left @ right).square().sum()
        torch.testing.assert_close(error, energies[rank:].sum(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(energies, torch.linalg.svdvals(weight) ** 2, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 7, 20, 26, 40])
def test_singular_values_of_a_product_are_those_of_its_matrix(rank):
    left, right = make_weight(20, rank), make_weight(rank, 26, seed=1)
    values = product_singular_values(left, right)
    assert len(values) == min(20, rank)
    expected = torch.linalg.svdvals(left @ right)
    torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=1e-14)


@pytest.mark.parametrize("which", [0, 1])
def test_singular_values_of_a_broken_factor_are_refused(which):
    factors = [make_weight(20, 3), make_weight(3, 26)]
    factors[which][1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="factor holds 1 NaN"):
        product_singular_values(*factors)


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


@pytest.mark.parametrize("shape", [(60, 80), (80, 60)])
def test_randomized_error_is_what_it_says_and_near_the_minimum(shape):
    weight = make_weight(*shape)
    tail = torch.linalg.svdvals(weight)[6:].square().sum()
    left, right, error = randomized_svd(weight, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close((weight - left @ right).square().sum(), error, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    assert tail * (1 - 1e-9) <= error <= tail * 1.001
    rough = randomized_svd(weight, 6, torch.Generator().manual_seed(0), oversampling=2, power_iterations=0)[2]
    assert rough > error
    full = randomized_svd(weight, 60, torch.Generator().manual_seed(0))
    assert (weight - full[0] @ full[1]).norm() < 1e-9 * weight.norm()
