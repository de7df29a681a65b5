"""Lower ranks with the error that was announced; other formats without any."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    FORMATS,
    ConfigError,
    FormatLinear,
    LowRankConfig,
    LowRankLinear,
    RankError,
    TargetError,
    UnknownNameError,
    collect_statistics,
    factorize,
    prune_channels,
    truncate,
)
from hf_lowrank.testing import tiny_model


@pytest.fixture(scope="module")
def made():
    dense, inputs = tiny_model("qwen2")
    statistics = collect_statistics(dense, [inputs()], method="whitened_svd")
    return {
        name: factorize(copy.deepcopy(dense), LowRankConfig(method="svd", format=name, param_ratio=0.6))
        for name in FORMATS.names()
    }, statistics, inputs  # fmt: skip


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FormatLinear)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize("format", FORMATS.names())
def test_the_error_is_that_of_the_best_approximation(made, format):
    model = copy.deepcopy(made[0][format])
    before = {name: layer.dense_weight().double() for name, layer in layers(model).items()}
    lost = truncate(model, rank=6)
    assert set(lost) == set(before)
    for name, layer in layers(model).items():
        values = torch.linalg.svdvals(before[name]).square()
        assert layer.rank == 6
        assert lost[name] == pytest.approx((values[6:].sum() / values.sum()).sqrt().item(), rel=1e-4)
        found = (layer.dense_weight() - before[name]).norm() / before[name].norm()
        assert found.item() == pytest.approx(lost[name], rel=1e-4)


def test_the_metric_of_the_inputs(made):
    models, statistics, _ = made
    name = "model.layers.1.mlp.up_proj"
    gram = statistics.get(name, ["input_gram"])["input_gram"]

    def error(**options):
        model = copy.deepcopy(models["low_rank"])
        before = model.get_submodule(name).dense_weight().double()
        truncate(model, rank=5, **options)
        rest = model.get_submodule(name).dense_weight().double() - before
        return ((rest @ gram) * rest).sum().item()

    assert error(method="whitened_svd", statistics=statistics) < error()


@pytest.mark.parametrize("target", FORMATS.names())
@pytest.mark.parametrize("source", FORMATS.names())
def test_every_format_becomes_every_other(made, source, target, tmp_path):
    models, _, inputs = made
    model = copy.deepcopy(models[source])
    expected, bias = logits(model, inputs), model.model.layers[0].self_attn.q_proj.bias
    lost = truncate(model, format=target)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=2e-6)
    assert all(error < 1e-6 for error in lost.values())
    assert {layer.name for layer in layers(model).values()} == {target}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


def test_patterns_and_what_is_low_already(made):
    model = copy.deepcopy(made[0]["low_rank"])
    before = {name: layer.rank for name, layer in layers(model).items()}
    lost = truncate(model, rank=1000, rank_pattern={"q_proj": 3, "layers.1.self_attn.q_proj": 2})
    assert len(lost) == 2
    after = {name: layer.rank for name, layer in layers(model).items()}
    changed = {name: rank for name, rank in after.items() if rank != before[name]}
    assert changed == {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 2}


def test_refusals_leave_the_model_alone(made):
    model = copy.deepcopy(made[0]["low_rank"])
    expected = logits(model, made[2])
    for rank in (0, 1.5, True):
        with pytest.raises(RankError, match=f"`rank`={rank} of truncate must be an integer of at least 1"):
            truncate(model, rank)
    with pytest.raises(TargetError, match="`rank_pattern` has 'no_proj', which matches no factorized layer"):
        truncate(model, rank_pattern={"no_proj": 3})
    with pytest.raises(UnknownNameError, match="Unknown format 'tensor'"):
        truncate(model, format="tensor")
    with pytest.raises(ConfigError, match="'whitened_svd' needs `statistics`"):
        truncate(model, 3, method="whitened_svd")
    with pytest.raises(TargetError, match="no factorized layer"):
        truncate(tiny_model("llama")[0], 3)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="carries adapters; call `merge_and_unload"):
        truncate(adapted, 3)
    assert torch.equal(logits(model, made[2]), expected)


def test_a_basis_in_use_by_others_is_refused():
    model, inputs = tiny_model("llama")
    method = {"name": "basis_sharing", "joint_groups": [["q_proj", "k_proj", "v_proj"]], "share_layers": 1}
    factorize(model, LowRankConfig(method=method, calibration=[inputs()], param_ratio=0.5))
    with pytest.raises(TargetError, match="shares its basis with other layers"):
        truncate(model, 3)


@pytest.mark.parametrize("method", ["tensor_train", "sparse_low_rank", "multi_resolution", "compot", "svd"])
def test_another_format_without_a_rank_loses_nothing(method):
    model, inputs = tiny_model("llama")
    calibration = [inputs()] if method == "compot" else None
    factorize(model, LowRankConfig(method=method, param_ratio=0.5), calibration)
    weights = {name: layer.exact_weight() for name, layer in layers(model).items()}
    lost = truncate(model, format="low_rank")
    assert set(lost) == (set() if method == "svd" else set(weights))
    for name, layer in layers(model).items():
        assert isinstance(layer, LowRankLinear)
        torch.testing.assert_close(layer.exact_weight(), weights[name], rtol=0, atol=1e-6)
    truncate(model, rank=4, format="pivoted")
    assert {layer.rank for layer in layers(model).values()} == {4}


def test_layers_that_were_pruned_are_left_alone():
    model, inputs = tiny_model("llama")
    feed_forward = ["gate_proj", "up_proj", "down_proj"]
    factorize(model, LowRankConfig(method="svd", rank=16, exclude_modules=feed_forward))
    prune_channels(model, 0.8, calibration=[inputs()])
    pruned = {name: p.clone() for name, p in model.named_parameters() if ".mlp." in name}
    lost = truncate(model, rank=12)
    assert lost
    assert not any(".mlp." in name for name in lost)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in pruned.items())
    with pytest.raises(TargetError, match="`rank_pattern` has 'up_proj', which matches no factorized layer"):
        truncate(model, rank_pattern={"up_proj": 3})


def test_statistics_may_be_a_file_and_arguments_are_what_they_should_be(tmp_path):
    model, inputs = tiny_model("llama")
    statistics = collect_statistics(model, [inputs()], method="whitened_svd")
    statistics.save(tmp_path / "statistics.safetensors")
    factorize(model, LowRankConfig(method="svd", rank=16))
    twin = copy.deepcopy(model)
    lost = truncate(model, 8, method="whitened_svd", statistics=statistics)
    assert truncate(twin, 8, method="whitened_svd", statistics=str(tmp_path / "statistics.safetensors")) == lost
    with pytest.raises(ConfigError, match="`method`='random' starts from scratch; choose 'svd'"):
        truncate(model, 4, method="random")
    with pytest.raises(ConfigError, match=r"`rank_pattern`=\['q_proj'\] of truncate must be a dict"):
        truncate(model, rank_pattern=["q_proj"])
    with pytest.raises(TargetError, match="`model`='me/model' must be a factorized model, not str"):
        truncate("me/model", 4)
