"""What the zeros and the scores of a pruned weight do to its factors."""

import pytest
import torch

from hf_lowrank import METHODS, CalibrationError, ConfigError, LowRankConfig, Statistics, collect_statistics, factorize
from hf_lowrank.methods.lpaf import IMPORTANCES, LPAF
from hf_lowrank.testing import check_method, make_weight, tiny_model


AXES = ("in", "out")


def pruned(rows=20, columns=30):
    """A weight with a third of its entries, unevenly over rows and columns."""
    weight = make_weight(rows, columns, decay=0.97)
    chance = torch.linspace(0.05, 0.6, columns) * torch.linspace(0.5, 1.5, rows)[:, None]
    return weight * (torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < chance)


def product(factors):
    return factors.left @ factors.right


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name != "nnz"])
def test_obeys_the_laws_of_methods(importance, axis):
    check_method(LPAF(importance, axis))


@pytest.mark.parametrize("axis", AXES)
def test_without_importance_it_is_the_svd_of_the_pruned_matrix(axis):
    ours, plain = (m.factorize(pruned(), 7, {}) for m in (LPAF("none", axis), METHODS["svd"]()))
    torch.testing.assert_close(product(ours), product(plain))
    assert ours.relative_error == pytest.approx(plain.relative_error)


def test_fisher_along_inputs_is_fwsvd():
    # On the smallest of the importances, 1e-6 of their mean is too much to be overlooked.
    fisher = torch.linspace(1, 50, 30, dtype=torch.float64)
    ours, theirs = (m.factorize(pruned(), 7, {"fisher_columns": fisher}) for m in (LPAF("fisher"), METHODS["fwsvd"]()))
    torch.testing.assert_close(product(ours), product(theirs), rtol=1e-5, atol=1e-6)


def test_weighing_outputs_is_weighing_inputs_of_the_transpose():
    weights = torch.linspace(0.1, 9, 20, dtype=torch.float64)
    out = LPAF(weight_axis="out").factorize(pruned(), 7, {"importance_rows": weights})
    transposed = LPAF().factorize(pruned().T, 7, {"importance_columns": weights})
    torch.testing.assert_close(product(out), product(transposed).T)
    plain = METHODS["svd"]().factorize(pruned(), 7, {})

    def energy(difference):
        return float((difference.square() * weights[:, None]).sum())

    error = energy(pruned() - product(out))
    assert error < 0.95 * energy(pruned() - product(plain))
    assert out.relative_error == pytest.approx((error / energy(pruned())) ** 0.5)


@pytest.mark.parametrize("axis", AXES)
def test_counts_of_what_is_left(axis):
    weight = pruned()
    dimension = 0 if axis == "in" else 1
    counts = (weight != 0).sum(dimension, keepdim=True).double()
    weigh = (counts + 1e-6 * counts.mean()).sqrt()
    u, s, v = torch.linalg.svd(weight * weigh, full_matrices=False)
    expected = (u[:, :7] * s[:7]) @ v[:7] / weigh
    method = LPAF("nnz", axis)
    ours = method.factorize(weight, 7, {})
    torch.testing.assert_close(product(ours), expected)
    torch.testing.assert_close(method.error_curve(weight, {})[7], s[7:].square().sum())
    assert (product(ours) - product(METHODS["svd"]().factorize(weight, 7, {}))).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="objective of `row_importance`='nnz'"):
        method.objective(weight, {})


def test_rows_and_columns_without_weights_cost_no_rank():
    weight = make_weight(20, 30)
    weight[8:] = 0
    weight[:, 5:] = 0
    importance = {"importance_columns": weight.abs().sum(0)}
    factors = LPAF().factorize(weight, 5, importance)
    torch.testing.assert_close(product(factors), weight)
    assert not factors.left[8:].abs().max() > 1e-12


def test_options_are_checked():
    with pytest.raises(ConfigError, match="`row_importance`='taylor' of lpaf must be one of"):
        LPAF(row_importance="taylor")
    with pytest.raises(ConfigError, match="`weight_axis`='rows' of lpaf"):
        LPAF(weight_axis="rows")


def test_importance_of_scores_comes_from_training_only(tmp_path):
    model, inputs = tiny_model("bert")
    told = r"\['importance_columns'\], which no pass over data collects.*keep_scores"
    for calibration in ([inputs()], "self", None):
        with pytest.raises(CalibrationError, match=told):
            factorize(model, LowRankConfig(method="lpaf", param_ratio=0.5, calibration=calibration))
    with pytest.raises(CalibrationError, match=r"\['importance_rows'\], which no pass over data collects"):
        collect_statistics(model, [inputs()], method=LPAF(weight_axis="out"))
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="which no pass over data collects"):
        type(model).from_pretrained(tmp_path, lowrank_config=LowRankConfig(method="lpaf", calibration=[inputs()]))


def test_statistics_in_memory_and_in_a_file(tmp_path):
    model, inputs = tiny_model("bert")
    names = [n for n, m in model.bert.named_modules(prefix="bert") if isinstance(m, torch.nn.Linear)]
    found = {
        name: {"importance_columns": torch.rand(model.get_submodule(name).in_features, dtype=torch.float64)}
        for name in names
    }
    statistics = Statistics({name: name for name in names}, found, {"tokens": 0})
    statistics.save(tmp_path / "importance.safetensors")
    config = LowRankConfig(method="lpaf", param_ratio=0.5)
    one = factorize(model, config, calibration=statistics)
    other = factorize(tiny_model("bert")[0], config, calibration=str(tmp_path / "importance.safetensors"))
    with torch.no_grad():
        assert torch.equal(one(**inputs()).logits, other(**inputs()).logits)
    fisher = LowRankConfig(method=LPAF("fisher", "out"), param_ratio=0.5)
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    factorize(tiny_model("bert")[0], fisher, calibration=[batch])
