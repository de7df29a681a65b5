"""The spectrum in a report is that of the weight the layer applies."""

import copy

import pytest
import torch

from hf_lowrank import FORMATS, LowRankConfig, TargetError, factorize, report, to_dense
from hf_lowrank.reporting.spectrum import POINTS, spectrum_of
from hf_lowrank.surgery import all_sites
from hf_lowrank.testing import tiny_model


def check(spectrum, expected):
    """`spectrum` has the first of the `expected` singular values; the others are rounding."""
    assert spectrum.index[0] == 1
    assert spectrum.index[-1] == spectrum.count
    found = torch.tensor(spectrum.values, dtype=torch.float64)
    wanted = expected[torch.tensor(spectrum.index) - 1]
    # Six digits are kept, and weights come in the dtype of the model.
    torch.testing.assert_close(found, wanted, rtol=5e-6, atol=1e-6 * expected[0].item())
    assert (expected[spectrum.count :] < 1e-6 * expected[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", FORMATS.names())
def test_singular_values_of_the_factors_are_those_of_the_weight(format, dtype):
    model, _ = tiny_model("llama")
    model.to(dtype)
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, format=format))
    layers = report(model).layers
    assert len(layers) == 14
    for layer in layers:
        assert layer.format == format
        assert layer.spectrum.count == layer.rank
        check(layer.spectrum, torch.linalg.svdvals(model.get_submodule(layer.name).dense_weight().double()))
        assert layer.dense_spectrum is None


def test_a_shared_basis_and_a_rank_above_the_outputs():
    model, inputs = tiny_model("llama")
    method = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q_proj", "k_proj", "v_proj"]]}
    config = LowRankConfig(method=method, rank=40, rank_multiple=1, target_modules=["q_proj", "k_proj", "v_proj"])
    factorize(model, config, calibration=[inputs()])
    layers = report(model).layers
    assert [layer.basis for layer in layers[:3]] == [None, layers[0].name, layers[0].name]
    for layer in layers:
        assert layer.spectrum.count == min(layer.rank, layer.full_rank)
        check(layer.spectrum, torch.linalg.svdvals(model.get_submodule(layer.name).dense_weight().double()))
    assert any(layer.rank > layer.full_rank for layer in layers)


def test_of_experts_the_root_mean_square():
    model, _ = tiny_model("mixtral")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, target_modules=".*experts.*"))
    layers = report(model).layers
    sites = {site.name: site for site in all_sites(to_dense(model))}
    assert len(layers) == 4
    for layer in layers:
        weights = sites[layer.name].kind.weight(model, sites[layer.name]).double()
        assert len(weights) == 4
        check(layer.spectrum, torch.linalg.svdvals(weights).square().mean(0).sqrt())


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_beside_the_dense_model(architecture):
    dense, _ = tiny_model(architecture)
    model = factorize(copy.deepcopy(dense), LowRankConfig(method="svd", param_ratio=0.5))
    sites = {site.name: site for site in all_sites(dense)}
    for layer in report(model, dense=dense).layers:
        weights = sites[layer.name].kind.weight(dense, sites[layer.name]).double()
        check(layer.dense_spectrum, torch.linalg.svdvals(weights).square().mean(0).sqrt())
        assert layer.dense_spectrum.count == layer.full_rank
        if len(weights) == 1:
            # Of the plain SVD, the recorded error is that of the weight; the dtype of the factors adds its rounding.
            assert abs(layer.weight_error - layer.relative_error) < 1e-6
        assert 0 < layer.weight_error < 1


def test_another_model_is_refused():
    model = factorize(tiny_model("llama")[0], LowRankConfig(method="svd", param_ratio=0.5))
    with pytest.raises(TargetError, match=r"`dense` has no dense linear layer model.layers.0.self_attn.q_proj"):
        report(model, dense=model)
    with pytest.raises(TargetError, match=r"`dense` has no .* \(14 of 14 are missing\)"):
        report(model, dense=tiny_model("gpt2")[0])
    wide = tiny_model("llama")[0]
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 97, bias=False)
    with pytest.raises(TargetError, match=r"model.layers.0.mlp.up_proj of another shape, \(1, 97, 64\)"):
        report(model, dense=wide)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 5000])
def test_long_spectra_are_thinned_out(count):
    values = torch.linspace(9, 1, count, dtype=torch.float64)
    spectrum = spectrum_of([values])
    assert spectrum.count == count
    assert len(spectrum.index) <= POINTS
    assert spectrum.index == sorted(set(spectrum.index))
    assert count > 40 or spectrum.index == list(range(1, count + 1))
    check(spectrum, values)
