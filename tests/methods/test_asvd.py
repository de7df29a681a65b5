import pytest
import torch

from hf_lowrank import METHODS, ConfigError
from hf_lowrank.testing import check_method, make_inputs, make_weight


def norms(inputs):
    return {"input_norm": torch.stack([inputs.abs().mean(0), inputs.square().mean(0).sqrt()])}


def product(factors):
    return factors.left @ factors.right


def textbook(weight, d, rank):
    u, s, v = torch.linalg.svd(weight * d, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] / d


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize(("scale", "row"), [("mean_abs", 0), ("rms", 1)])
def test_the_textbook_form_divides_by_the_scale(shape, scale, row):
    weight, stats = make_weight(*shape), norms(make_inputs(shape[1]))
    d = stats["input_norm"][row] ** 0.7
    found = METHODS["asvd"](alpha=0.7, scale=scale).factorize(weight, 7, stats)
    torch.testing.assert_close(product(found), textbook(weight, d, 7), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_uncorrelated_inputs_make_it_whitened_svd(shape):
    weight, inputs = make_weight(*shape), torch.linalg.qr(make_inputs(shape[1]))[0]
    inputs = inputs * torch.linspace(0.1, 3, shape[1], dtype=torch.float64)
    ours = METHODS["asvd"](alpha=1, scale="rms").factorize(weight, 7, norms(inputs))
    theirs = METHODS["whitened_svd"]().factorize(weight, 7, {"input_gram": inputs.T @ inputs})
    torch.testing.assert_close(product(ours), product(theirs), rtol=1e-6, atol=1e-8)
    assert abs(ours.relative_error - theirs.relative_error) < 1e-9


def test_between_plain_and_whitened_svd():
    weight, inputs = make_weight(30, 20), make_inputs(20)
    stats = {**norms(inputs), "input_gram": inputs.T @ inputs}
    methods = {"whitened_svd": {}, "asvd": {"alpha": 1, "scale": "rms"}, "svd": {}}
    left_over = {name: weight - product(METHODS[name](**o).factorize(weight, 7, stats)) for name, o in methods.items()}
    frobenius = {name: float(rest.square().sum()) for name, rest in left_over.items()}
    weighted = {name: float((rest * stats["input_norm"][1]).square().sum()) for name, rest in left_over.items()}
    output = {name: float((inputs @ rest.T).square().sum()) for name, rest in left_over.items()}
    assert weighted["asvd"] < weighted["svd"]
    assert frobenius["svd"] < frobenius["asvd"]
    assert output["whitened_svd"] < output["asvd"]


def test_alpha_of_zero_is_plain_svd():
    weight, stats = make_weight(20, 30), norms(make_inputs(30))
    plain = METHODS["svd"]().factorize(weight, 7, {})
    torch.testing.assert_close(product(METHODS["asvd"](alpha=0).factorize(weight, 7, stats)), product(plain))


def test_a_channel_that_is_always_zero_costs_the_others_nothing():
    weight, inputs = make_weight(20, 30), make_inputs(30)
    inputs[:, 7:] = 0
    found = METHODS["asvd"]().factorize(weight, 7, norms(inputs))
    torch.testing.assert_close(product(found)[:, :7], weight[:, :7], rtol=1e-4, atol=1e-6)
    assert torch.isfinite(found.right).all()


def test_all_options_keep_the_laws():
    for alpha in (0, 1):
        check_method(METHODS["asvd"](alpha=alpha, scale="rms"))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="`alpha`=-1 of asvd must be a number of at least 0"):
        METHODS["asvd"](alpha=-1)
    with pytest.raises(ConfigError, match="`scale`='max' of asvd must be one of"):
        METHODS["asvd"](scale="max")
