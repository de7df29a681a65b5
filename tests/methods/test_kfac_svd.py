import pytest
import torch

from hf_lowrank import METHODS, ConfigError
from hf_lowrank.testing import check_method, make_gram, make_weight
from hf_lowrank.testing.methods import make_statistics


def plain(**kwargs):
    return METHODS["kfac_svd"](input_shrinkage=0.0, grad_shrinkage=0.0, **kwargs)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_the_textbook_form_with_two_inverses(shape):
    rows, columns = shape
    weight = make_weight(rows, columns)
    stats = {"input_gram": make_gram(columns), "gradient_gram": make_gram(rows, seed=3)}
    r, lower = (torch.linalg.cholesky(stats[name]) for name in ("gradient_gram", "input_gram"))
    u, s, v = torch.linalg.svd(r.T @ weight @ lower, full_matrices=False)
    expected = torch.linalg.inv(r.T) @ (u[:, :7] * s[:7]) @ v[:7] @ torch.linalg.inv(lower)
    factors = plain().factorize(weight, 7, stats)
    torch.testing.assert_close(factors.left @ factors.right, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(plain().error_curve(weight, stats)[7], (s[7:] ** 2).sum(), rtol=1e-6, atol=1e-9)


def test_identity_on_the_output_side_is_whitened_svd():
    weight, gram = make_weight(20, 30), make_gram(30)
    stats = {"input_gram": gram, "gradient_gram": torch.eye(20, dtype=torch.float64)}
    ours = plain().factorize(weight, 7, stats)
    theirs = METHODS["whitened_svd"]().factorize(weight, 7, {"input_gram": gram})
    torch.testing.assert_close(ours.left @ ours.right, theirs.left @ theirs.right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("option", ["input_shrinkage", "grad_shrinkage"])
def test_options_are_checked(option):
    with pytest.raises(ConfigError, match=rf"`{option}`=1.5 of kfac_svd must be a number in \[0, 1\)"):
        METHODS["kfac_svd"](**{option: 1.5})


def test_a_layer_the_loss_ignores_costs_nothing_and_is_cut_by_output_error():
    weight, gram = make_weight(20, 30), make_gram(30)
    stats = {"input_gram": gram, "gradient_gram": torch.zeros(20, 20, dtype=torch.float64)}
    ours = plain().factorize(weight, 7, stats)
    theirs = METHODS["whitened_svd"]().factorize(weight, 7, {"input_gram": gram})
    torch.testing.assert_close(ours.left @ ours.right, theirs.left @ theirs.right, rtol=1e-6, atol=1e-9)
    assert ours.relative_error == 0
    assert not plain().error_curve(weight, stats).any()


def test_joint_groups_minimise_the_sum_of_their_members_losses():
    outs, columns, rank = (12, 5, 7), 30, 6
    weight, gram = make_weight(sum(outs), columns), make_gram(columns)
    gradients = [make_gram(rows, seed=rows) for rows in outs]
    stats = {"input_gram": gram, "gradient_gram": torch.block_diag(*gradients)}
    method = plain(joint_groups=[["q", "k", "v"]])
    factors = method.factorize(weight, rank, stats)
    parts, lefts = weight.split(outs), factors.left.split(outs)
    members = [{"input_gram": gram, "gradient_gram": gradient} for gradient in gradients]
    achieved, separate = 0, 0
    for part, left, member in zip(parts, lefts, members, strict=True):
        achieved += method.objective(part - left @ factors.right, member)
        separate += method.error_curve(part, member)[min(rank, len(part))]
    torch.testing.assert_close(achieved, method.error_curve(weight, stats)[rank], rtol=1e-6, atol=0)
    assert achieved >= separate


def test_shrunk_to_the_diagonal_the_laws_hold_and_it_is_another_metric():
    check_method(METHODS["kfac_svd"](shrinkage_target="diagonal"))
    weight = make_weight(24, 40)
    stats = make_statistics(METHODS["kfac_svd"](), 24, 40)
    one, other = (METHODS["kfac_svd"](shrinkage_target=target) for target in ("identity", "diagonal"))
    assert not torch.allclose(one.factorize(weight, 6, stats).product(), other.factorize(weight, 6, stats).product())
    with pytest.raises(ConfigError, match=r"`shrinkage_target`='trace' of kfac_svd must be one of \['identity'"):
        METHODS["kfac_svd"](shrinkage_target="trace")
