"""What cannot be served says so before anything is computed, and names the cure."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lowrank import LowRankConfig, factorize
from hf_lowrank.integrations.vllm.checkpoint import members, read_modules
from hf_lowrank.integrations.vllm.errors import ServingError
from hf_lowrank.testing import tiny_model

from .served import build, serve


LOW_RANK = {"format": "low_rank", "rank": 4}
SHARED = {"format": "shared_basis", "rank": 4}


def config(modules, version=1):
    return {"quant_method": "lowrank", "version": version, "recipe": {}, "modules": modules}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, format="pivoted")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (config({"a": LOW_RANK}, version=2), "version 2, this plugin reads version 1; install the hf-lowrank"),
        (
            {**config({"a": LOW_RANK}), "inner": {"quant_method": "torchao"}},
            "factors of this checkpoint are quantized",
        ),
        (config({}), "a recipe that was not carried out"),
        ({"quant_method": "lowrank", "version": 1, "recipe": {}}, "a recipe that was not carried out"),
        (config({"a": {"format": "wavelet", "rank": 3}}), r"a as .*wavelet.*truncate\(model, format=\"low_rank\"\)"),
        (config({"a": "low_rank"}), "stores a as 'low_rank'"),
        (config({"a": {"format": "low_rank", "rank": "4"}}), "rank='4' of a must be a positive integer"),
        (config({"a": {"format": "pivoted"}}), "rank=None of a must be"),
        (config({"a": {**LOW_RANK, "in_features": 8}}), "a has fewer channels than its architecture"),
        (config({"a": {**SHARED, "basis": "b"}}), "a borrows the basis of 'b', which has none"),
        (config({"a": {**SHARED, "basis": "b"}, "b": {**SHARED, "basis": "a"}}), "which has none"),
    ],
)
def test_configs(described, message):
    with pytest.raises(ServingError, match=message):
        read_modules(described)


def test_members_of_a_fused_layer_are_found_by_their_own_names():
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "W_pack": ["W_pack"]}
    modules = {"m.0.k_proj": LOW_RANK, "m.0.W_pack": LOW_RANK, "top": LOW_RANK}
    assert members("m.0.qkv_proj", packed, modules) == {"m.0.q_proj": None, "m.0.k_proj": LOW_RANK, "m.0.v_proj": None}
    assert members("m.0.W_pack", packed, modules) == {"m.0.W_pack": LOW_RANK}
    assert members("m.0.o_proj", packed, modules) == {"m.0.o_proj": None}
    assert members("top", packed, modules) == {"top": LOW_RANK}


def quant(vllm, modules):
    return vllm.CONFIGS["lowrank"].from_config(config(modules))


def test_what_the_config_says_of_itself(vllm):
    cls = vllm.CONFIGS["lowrank"]
    served = quant(vllm, {"a": LOW_RANK})
    assert served.get_name() == "lowrank"
    assert torch.bfloat16 in served.get_supported_act_dtypes()
    assert cls.get_min_capability() == -1
    assert cls.get_config_filenames() == []


def test_dense_layers_and_other_modules_are_left_to_vllm(vllm):
    served = quant(vllm, {"m.q_proj": LOW_RANK})
    layer = vllm.ReplicatedLinear(8, 8, prefix="m.o_proj", quant_config=served)
    assert type(layer.quant_method) is vllm.UnquantizedLinearMethod
    for attention in ("m.attn", "m"):
        assert served.get_quant_method(torch.nn.Module(), attention) is None
    assert served.get_quant_method(vllm.RoutedExperts(), "m.mlp.experts") is None


@pytest.mark.parametrize(
    ("kind", "prefix", "name"),
    [
        ("RoutedExperts", "m.mlp.experts", "m.mlp.experts.gate_up_proj"),
        ("RoutedExperts", "m.mlp.experts", "m.mlp.experts.3.up_proj"),
        ("ParallelLMHead", "lm_head", "lm_head"),
    ],
)
def test_experts_and_heads(vllm, kind, prefix, name):
    with pytest.raises(ServingError, match=rf"{name} is factorized, and vLLM applies .*{kind}.*`exclude_modules`"):
        quant(vllm, {name: LOW_RANK}).get_quant_method(getattr(vllm, kind)(), prefix)


def damaged(checkpoint, folder, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "missing", [f"{Q}.basis.weight", f"{Q}.order", f"{Q}.coefficients.weight", f"{DOWN}.coefficients.weight"]
)
def test_a_tensor_that_never_came(vllm, checkpoint, missing, tmp_path):
    with pytest.raises(ServingError, match=rf"{missing} is not among the weights"):
        serve(damaged(checkpoint, tmp_path, lambda tensors: tensors.pop(missing)))


def test_a_model_class_that_turns_weights_round(vllm, checkpoint, tmp_path):
    def turn(tensors):
        tensors[f"{DOWN}.basis.weight"] = tensors[f"{DOWN}.basis.weight"].T.contiguous()

    with pytest.raises(ServingError, match=r"down_proj.basis.weight has shape .* the other way round"):
        serve(damaged(checkpoint, tmp_path, turn))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [(["order"], "with 63 outputs, what came before .* 64"), (["order", "coefficients.weight"], "do not agree")],
)
def test_a_module_of_another_width(vllm, checkpoint, leaves, message, tmp_path):
    def shorten(tensors):
        for leaf in leaves:
            tensors[f"{DOWN}.{leaf}"] = tensors[f"{DOWN}.{leaf}"][:-1].clone()

    with pytest.raises(ServingError, match=message):
        serve(damaged(checkpoint, tmp_path, shorten))


def test_a_tensor_that_the_config_does_not_speak_of(vllm, checkpoint, tmp_path):
    folder = damaged(checkpoint, tmp_path, lambda tensors: None)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"]["modules"][Q] = {"format": "low_rank", "rank": 4}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ServingError, match=rf"{Q}.basis.weight, which its config does not speak of"):
        serve(folder)


def fused(vllm, modules, sizes, packed, **options):
    served = quant(vllm, modules)
    served.packed_modules_mapping.update(packed)
    return vllm.MergedColumnParallelLinear(6, sizes, bias=False, quant_config=served, prefix="m.ab", **options)


def test_parts_that_vllm_names_in_an_unknown_way(vllm):
    layer = fused(vllm, {"m.a": LOW_RANK}, [4, 4, 4], {"ab": ["a", "b"]})
    with pytest.raises(ServingError, match=r"loads part \(0, 1\) of a layer made of \['m.a', 'm.b'\]"):
        layer.right.weight.weight_loader(layer.right.weight, torch.zeros(4, 6), (0, 1))
    with pytest.raises(ServingError, match="loads part None"):
        layer.right.weight.weight_loader(layer.right.weight, torch.zeros(4, 6))


def test_a_bias_that_would_get_lost(vllm):
    layer = fused(vllm, {"m.ab": LOW_RANK}, [8], {}, skip_bias_add=True)
    for name, shape in (("right.weight", (4, 6)), ("left.weight", (8, 4)), ("left.bias", (8,))):
        layer.get_parameter(name).weight_loader(layer.get_parameter(name), torch.zeros(shape))
    with pytest.raises(ServingError, match="m.ab has a bias that the architecture has no place for"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_bias_that_never_came(vllm):
    served = quant(vllm, {"m.a": LOW_RANK})
    layer = vllm.RowParallelLinear(6, 8, quant_config=served, prefix="m.a")
    for name, shape in (("right.weight", (4, 6)), ("left.weight", (8, 4))):
        layer.get_parameter(name).weight_loader(layer.get_parameter(name), torch.zeros(shape))
    with pytest.raises(ServingError, match="m.a has a bias in vLLM and none in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_basis_that_another_process_holds(vllm):
    served = quant(vllm, {"first.a": SHARED, "m.a": {**SHARED, "basis": "first.a"}})
    layer = vllm.ReplicatedLinear(6, 8, bias=False, quant_config=served, prefix="m.a")
    layer.left.weight.weight_loader(layer.left.weight, torch.zeros(8, 4))
    with pytest.raises(ServingError, match="m.a borrows the basis of first.a, which this process .*pipeline"):
        layer.quant_method.process_weights_after_loading(layer)


def test_nothing_that_loads_stays_behind(vllm, checkpoint):
    model, _ = build(checkpoint)
    doors = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.self_attn.qkv_proj.basis.weight" in doors
    kept = {name for name, _ in serve(checkpoint)[0].named_parameters()}
    assert all(".factors." in name for name in kept)
