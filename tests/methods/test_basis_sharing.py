import pytest
import torch

from hf_lowrank import METHODS, ConfigError, Statistics
from hf_lowrank.testing import make_gram, make_weight


OUTS = (24, 8, 10)


def group(columns=30):
    """A stacked weight, its parts, and the Gram matrix of their input."""
    weight = make_weight(sum(OUTS), columns)
    return weight, weight.split(OUTS), {"input_gram": make_gram(columns)}


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_a_group_of_one_is_whitened_svd(shape):
    weight, stats = make_weight(*shape), {"input_gram": make_gram(shape[1])}
    for shrinkage in (0.0, 0.3):
        ours = METHODS["basis_sharing"](shrinkage=shrinkage).factorize(weight, 7, stats)
        theirs = METHODS["whitened_svd"](shrinkage=shrinkage).factorize(weight, 7, stats)
        assert torch.equal(ours.left, theirs.left)
        assert torch.equal(ours.right, theirs.right)
        assert ours.relative_error == theirs.relative_error


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_error_of_the_stack_is_its_tail_and_the_sum_over_the_parts(rank):
    weight, parts, stats = group()
    method = METHODS["basis_sharing"]()
    factors = method.factorize(weight, rank, stats)
    lower = torch.linalg.cholesky(stats["input_gram"])
    tail = torch.linalg.svdvals(weight @ lower)[rank:].square().sum()
    lefts = factors.left.split(OUTS)
    achieved = [method.objective(part - left @ factors.right, stats) for part, left in zip(parts, lefts, strict=True)]
    torch.testing.assert_close(sum(achieved), tail, rtol=1e-8, atol=0)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_at_equal_rank_sharing_costs_error(rank):
    weight, parts, stats = group()
    method = METHODS["basis_sharing"]()
    joint = method.error_curve(weight, stats)[rank]
    separate = sum(method.error_curve(part, stats)[rank] for part in parts)
    assert joint >= separate


def test_at_equal_parameters_parts_that_agree_gain_and_parts_that_do_not_lose():
    rows, columns, rank = 16, 64, 4
    stats = {"input_gram": torch.eye(columns, dtype=torch.float64)}
    method = METHODS["basis_sharing"]()
    affordable = rank * 2 * (rows + columns) // (2 * rows + columns)
    assert affordable > rank
    weight = make_weight(rows, columns)
    for other, gains in ((weight + 0.01 * make_weight(rows, columns, seed=5), True), (weight.flip(1), False)):
        joint = method.error_curve(torch.cat([weight, other]), stats)[affordable]
        separate = method.error_curve(weight, stats)[rank] + method.error_curve(other, stats)[rank]
        assert (joint < separate) == gains


def test_between_layers_the_minimum_bounds_the_error_of_the_outputs():
    columns, rank = 30, 7
    weights = [make_weight(20, columns, seed=seed) for seed in (0, 3)]
    grams = [make_gram(columns, seed=seed) for seed in (1, 4)]
    method = METHODS["basis_sharing"]()
    stats = {"input_gram": grams[0] + grams[1]}
    factors = method.factorize(torch.cat(weights), rank, stats)
    differences = [w - left @ factors.right for w, left in zip(weights, factors.left.split(20), strict=True)]
    error = sum(((d @ gram) * d).sum() for d, gram in zip(differences, grams, strict=True))
    assert 0 < error <= method.error_curve(torch.cat(weights), stats)[rank]


def test_statistics_of_a_group_count_every_input_once_and_every_output():
    tensors = {
        "q": {"input_gram": make_gram(6), "gradient_gram": make_gram(4, seed=2)},
        "k": {"gradient_gram": make_gram(3, seed=3)},
        "later.q": {"input_gram": make_gram(6, seed=4), "gradient_gram": make_gram(4, seed=5)},
    }
    statistics = Statistics({"q": "q", "k": "q", "later.q": "later.q"}, tensors, {})
    joint = statistics.joint(["q", "k", "later.q"], ("input_gram", "gradient_gram"))
    assert torch.equal(joint["input_gram"], tensors["q"]["input_gram"] + tensors["later.q"]["input_gram"])
    blocks = [tensors[name]["gradient_gram"] for name in ("q", "k", "later.q")]
    assert torch.equal(joint["gradient_gram"], torch.block_diag(*blocks))
    assert torch.equal(statistics.joint(["k"], ("input_gram",))["input_gram"], tensors["q"]["input_gram"])


@pytest.mark.parametrize("name", ["basis_sharing", "kfac_svd"])
@pytest.mark.parametrize("groups", ["q_proj", [["q_proj"]], [["q_proj", "q_proj"]], [["q_proj", 3]], 3, None])
def test_groups_are_checked(name, groups):
    with pytest.raises(ConfigError, match=rf"`joint_groups`=.* of {name} must be a list of groups, each a list of"):
        METHODS[name](joint_groups=groups)


def test_options_are_checked():
    for count in (0, 1.5, True):
        with pytest.raises(ConfigError, match=r"`share_layers`=.* of basis_sharing must be an integer of at least 1"):
            METHODS["basis_sharing"](share_layers=count)
    with pytest.raises(ConfigError, match=r"`shrinkage`=1 of basis_sharing must be a number in \[0, 1\)"):
        METHODS["basis_sharing"](shrinkage=1)


def test_options_survive_json():
    method = METHODS["basis_sharing"](share_layers=1, joint_groups=[["q", "k"]])
    described = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q", "k"]]}
    assert METHODS.build(described) == method
    assert METHODS.build(METHODS.describe(method)) == method
