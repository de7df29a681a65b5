"""A method that shifts biases: where there is one, where there is none, in memory and while loading."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_lowrank
from hf_lowrank import FORMATS, ConfigError, LowRankConfig, collect_statistics, factorize, summary, to_dense
from hf_lowrank.surgery import factorized, match_sites
from hf_lowrank.testing import tiny_model


DENSE_MODELS = ["llama", "gpt2", "bert", "t5", "vit", "qwen2"]
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def config_for(statistics, folder, **options):
    statistics.save(folder / "statistics.safetensors")
    options = {"param_ratio": 0.6, "rank_multiple": 1, **options}
    return LowRankConfig(**{"method": "feature_pca", "calibration": str(folder / "statistics.safetensors"), **options})


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs()).logits


def prepared(name, folder, **options):
    """A dense model, its checkpoint, inputs, and a configuration with statistics of these inputs."""
    model, inputs = tiny_model(name)
    for parameter in model.parameters():
        # Biases of a fresh model are zero, which would hide one that is lost.
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "dense")
    return model, inputs, config_for(collect_statistics(model, [inputs()], method="feature_pca"), folder, **options)


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_the_bias_is_the_dense_one_and_the_shift(name, tmp_path):
    dense, inputs, config = prepared(name, tmp_path)
    model, info = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config, output_loading_info=True)
    assert info == CLEAN
    statistics = hf_lowrank.Statistics.load(config.calibration)
    found = {site.name: site for site in match_sites(dense) if site.name in factorized(model)}
    assert found
    for site_name, site in found.items():
        weight = site.kind.weight(dense, site)[0].double()
        layer = model.get_submodule(site_name)
        mean = statistics.get(site_name, ["input_mean"])["input_mean"]
        shift = weight @ mean - layer.dense_weight().double() @ mean
        bias = site.kind.bias(dense, site)
        expected = shift if bias is None else bias.double() + shift
        torch.testing.assert_close(layer.bias.double(), expected, rtol=1e-4, atol=1e-5)
        assert layer.added_bias == (bias is None)


@pytest.mark.parametrize("format", FORMATS.names())
@pytest.mark.parametrize("name", DENSE_MODELS)
def test_in_memory_while_loading_and_reloaded_are_one_model(name, format, tmp_path):
    dense, inputs, config = prepared(name, tmp_path, format=format)
    cls, sites = type(dense), {site.name: site for site in match_sites(dense)}
    streamed = cls.from_pretrained(tmp_path / "dense", lowrank_config=config)
    in_memory = factorize(dense, config)
    assert torch.equal(logits(in_memory, inputs), logits(streamed, inputs))
    for model in (in_memory, streamed):
        model.save_pretrained(tmp_path / "small")
        again, info = cls.from_pretrained(tmp_path / "small", output_loading_info=True)
        assert info == CLEAN
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        assert str(summary(again)) == str(summary(model))
        modules = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["modules"]
        assert {key for key, spec in modules.items() if spec.get("bias")} == {
            key for key in modules if not sites[key].bias
        }


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_weights_may_arrive_before_their_biases(name, tmp_path, monkeypatch):
    dense, inputs, config = prepared(name, tmp_path)
    usual = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)
    monkeypatch.setattr(transformers.core_model_loading, "dot_natural_key", lambda key: [-ord(c) for c in key])
    reverse, info = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config, output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(reverse, inputs), logits(usual, inputs))


def test_a_bias_that_the_checkpoint_lacks_is_the_shift(tmp_path):
    dense, _, config = prepared("bert", tmp_path)
    state = load_file(tmp_path / "dense" / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense"
    del state[f"{name}.bias"]
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)
    with torch.no_grad():
        dense.get_submodule(name).bias.zero_()
    torch.testing.assert_close(model.get_submodule(name).bias, factorize(dense, config).get_submodule(name).bias)


def test_the_mean_output_of_the_first_layer_is_exact(tmp_path):
    dense, inputs, config = prepared("llama", tmp_path)
    model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)
    name, means = "model.layers.0.self_attn.q_proj", []
    for some in (dense, model):
        handle = some.get_submodule(name).register_forward_hook(lambda *args: means.append(args[2].mean((0, 1))))
        logits(some, inputs)
        handle.remove()
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("allocation", ["uniform", "knapsack"])
def test_added_biases_count_against_the_budget(allocation, tmp_path):
    dense, _, config = prepared("llama", tmp_path, allocation=allocation, param_ratio=0.3)
    targeted = sum(site.out_features * site.in_features for site in match_sites(dense))
    model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)
    rows = summary(model).rows
    assert len(rows) == 14
    for row in rows:
        out_features, in_features = (int(size) for size in row.shape.split(" x "))
        assert row.parameters == row.rank * (out_features + in_features) + out_features
    assert sum(row.parameters for row in rows) <= 0.3 * targeted
    assert summary(model).parameters == sum(p.numel() for p in model.parameters())
    assert summary(model).dense_parameters == sum(p.numel() for p in dense.parameters())
    in_memory = factorize(dense, config)
    assert [row.rank for row in summary(in_memory).rows] == [row.rank for row in rows]


def test_a_dense_model_keeps_added_biases_and_says_so(tmp_path, caplog):
    dense, inputs, config = prepared("llama", tmp_path)
    model = factorize(dense, config)
    expected = logits(model, inputs)
    with caplog.at_level(logging.WARNING):
        to_dense(model)
    assert "14 dense layers, such as model.layers.0.self_attn.q_proj, now have a bias" in caplog.text
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    assert not factorized(model)


def test_a_dense_model_that_has_biases_anyway_can_be_saved(tmp_path, caplog):
    dense, inputs, config = prepared("gpt2", tmp_path)
    model = factorize(dense, config)
    expected = logits(model, inputs)
    with caplog.at_level(logging.WARNING):
        to_dense(model).save_pretrained(tmp_path / "again")
    assert "now have a bias" not in caplog.text
    again, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert info == CLEAN
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-5)


def test_experts_have_no_place_for_it(tmp_path):
    dense, inputs, config = prepared("mixtral", tmp_path)
    for run in (
        lambda: type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config),
        lambda: factorize(dense, config),
    ):
        with pytest.raises(
            ConfigError, match="'feature_pca' changes biases, and model.layers.0.mlp.experts.* no place"
        ):
            run()
    attention = config_for(hf_lowrank.Statistics.load(config.calibration), tmp_path, exclude_modules=".*experts.*")
    assert factorized(type(dense).from_pretrained(tmp_path / "dense", lowrank_config=attention))
    centred = config_for(
        hf_lowrank.Statistics.load(config.calibration),
        tmp_path,
        method={"name": "feature_pca", "bias_correction": False},
    )
    model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=centred)
    assert any("experts" in name for name in factorized(model))
    assert all(model.get_submodule(name).bias is None for name in factorized(model) if "experts" not in name)


def test_an_overflowing_bias_keeps_its_type_and_name(tmp_path):
    dense, _, config = prepared("gpt2", tmp_path)
    name = "transformer.h.0.mlp.c_fc"
    state = load_file(tmp_path / "dense" / "model.safetensors")
    state[f"{name}.bias"].fill_(float("inf"))
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_lowrank.NonFiniteError, match=rf"{name}: the bias in torch.float32 holds"):
        type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)


@pytest.mark.parametrize(
    ("name", "on_disk", "layer"),
    [("llama", "model.layers.1", "self_attn.q_proj"), ("gpt2", "transformer.h.1", "mlp.c_fc")],
)
def test_disk_offload(name, on_disk, layer, tmp_path):
    dense, inputs, config = prepared(name, tmp_path)
    expected = logits(type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config), inputs)
    parts = [key for key, module in dense.named_modules() if key and (key.count(".") == 1 or key == "lm_head")]
    device_map = {key: "cpu" for key in parts if not key.endswith((".layers", ".h"))}
    blocks = on_disk.rpartition(".")[0]
    device_map |= {f"{blocks}.0": "cpu", f"{blocks}.1": "disk"}
    model = type(dense).from_pretrained(
        tmp_path / "dense", lowrank_config=config, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.get_submodule(f"{on_disk}.{layer}").bias.is_meta
    assert torch.equal(logits(model, inputs), expected)
