import pytest
import torch

from hf_lowrank import METHODS, ConfigError
from hf_lowrank.testing import make_gram, make_inputs, make_weight


ROWS, COLUMNS, RANK = 20, 30, 7
WEIGHT = make_weight(ROWS, COLUMNS)
INPUTS = make_inputs(COLUMNS, 200)
COMPRESSED = INPUTS + 0.3 * make_inputs(COLUMNS, 200, seed=5)
GRADIENTS = make_gram(ROWS, seed=3)


def anchored(**kwargs):
    return METHODS["anchored_svd"](**kwargs)


def compared(inputs, compressed):
    return {
        "input_gram": inputs.T @ inputs,
        "compressed_gram": compressed.T @ compressed,
        "cross_gram": inputs.T @ compressed,
        "gradient_gram": GRADIENTS,
    }


def product(method, stats, rank=RANK):
    factors = method.factorize(WEIGHT, rank, stats)
    return factors.left @ factors.right


@pytest.mark.parametrize("ridge", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize(
    "options", [{}, {"shrinkage_target": "diagonal"}, {"two_sided": False}], ids=["two-sided", "diagonal", "one-sided"]
)
def test_equal_streams_give_the_method_it_builds_on(ridge, options):
    stats = compared(INPUTS, INPUTS)
    shrinkage = ridge / (1 + ridge)
    theirs = METHODS["whitened_svd"](shrinkage=shrinkage)
    if "two_sided" not in options:
        theirs = METHODS["kfac_svd"](input_shrinkage=shrinkage, grad_shrinkage=0.1, **options)
    ours = product(anchored(ridge=ridge, **options), stats)
    torch.testing.assert_close(ours, product(theirs, stats), rtol=1e-9, atol=1e-12)


def test_an_infinite_ridge_gives_plain_svd():
    ours = product(anchored(ridge=1e12, two_sided=False), compared(INPUTS, COMPRESSED))
    torch.testing.assert_close(ours, product(METHODS["svd"](), {}), rtol=1e-8, atol=1e-9)


def test_no_other_matrix_of_the_rank_comes_closer_to_the_dense_outputs():
    stats = compared(INPUTS, COMPRESSED)
    wanted = INPUTS @ WEIGHT.T

    def error(weight):
        return float((wanted - COMPRESSED @ weight.T).square().sum())

    # By another road: the best unconstrained answer from least squares, then Eckart-Young among the outputs.
    free = torch.linalg.lstsq(COMPRESSED, wanted).solution
    u, s, v = torch.linalg.svd(COMPRESSED @ free, full_matrices=False)
    best = float((wanted - (u[:, :RANK] * s[:RANK]) @ v[:RANK]).square().sum())
    ours = error(product(anchored(ridge=1e-10, two_sided=False), stats))
    assert ours == pytest.approx(best, rel=1e-6)
    assert ours < 0.99 * error(product(METHODS["whitened_svd"](), stats))


@pytest.mark.parametrize("target", ["identity", "diagonal"])
def test_the_ridge_holds_on_to_the_weight_and_is_part_of_the_optimum(target):
    stats, ridge = compared(INPUTS, COMPRESSED), 0.3
    # Without a gradient the metric is that of the outputs.
    stats["gradient_gram"] = torch.eye(ROWS, dtype=torch.float64)
    diagonal = stats["compressed_gram"].diagonal()
    strength = ridge * (diagonal.mean().expand(COLUMNS) if target == "identity" else diagonal)

    def error(weight):
        outputs = (INPUTS @ WEIGHT.T - COMPRESSED @ weight.T).square().sum()
        return float(outputs + (strength * (WEIGHT - weight).square()).sum())

    # The ridge as so many more inputs, alike in both models.
    extra = strength.sqrt().diag()
    longer = compared(torch.cat([INPUTS, extra]), torch.cat([COMPRESSED, extra]))
    longer["gradient_gram"] = stats["gradient_gram"]
    ours = product(anchored(ridge=ridge, shrinkage_target=target), stats)
    theirs = product(anchored(ridge=1e-12, shrinkage_target=target), longer)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert error(ours) <= error(product(anchored(ridge=0.1, shrinkage_target=target), stats))


def test_beta_goes_from_the_weight_to_the_anchored_one():
    stats = compared(INPUTS, COMPRESSED)
    targets = [anchored(beta=beta).target(WEIGHT, stats) for beta in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(targets[0], WEIGHT, rtol=0, atol=1e-12)
    torch.testing.assert_close(targets[1], (targets[0] + targets[2]) / 2, rtol=1e-9, atol=1e-12)
    assert (targets[2] - WEIGHT).norm() > 0.01 * WEIGHT.norm()


def test_inputs_that_are_all_zero_leave_the_weight_its_own_target():
    nothing = torch.zeros(10, COLUMNS, dtype=torch.float64)
    assert torch.equal(anchored().target(WEIGHT, compared(nothing, nothing)), WEIGHT)


def test_options_are_checked():
    for option, value, allowed in (
        ("ridge", 0, "a number above 0"),
        ("beta", 1.5, r"a number in \[0, 1\]"),
        ("grad_shrinkage", 1.0, r"a number in \[0, 1\)"),
        ("two_sided", "yes", "True or False"),
        ("shrinkage_target", "none", r"one of \['identity', 'diagonal'\]"),
    ):
        with pytest.raises(ConfigError, match=rf"`{option}`={value!r} of anchored_svd must be {allowed}"):
            anchored(**{option: value})
    with pytest.raises(ConfigError, match=r"`shrinkage_target`='diagonal' of anchored_svd must be one of \['ident"):
        anchored(shrinkage_target="diagonal", two_sided=False)


def test_what_it_reads_and_who_divides_the_budget_follow_the_metric():
    assert anchored().statistics == ("input_gram", "gradient_gram")
    assert anchored().allocation == "knapsack"
    assert anchored(two_sided=False).statistics == ("input_gram",)
    assert anchored(two_sided=False).allocation == "uniform"
