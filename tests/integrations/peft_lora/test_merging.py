"""Merging is exact, stays factorized, is saved as such, and is undone to the bit; or it is refused."""

import copy
import warnings

import pytest
import torch
from peft import LoHaConfig, PeftMixedModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    FORMATS,
    ComputedWeightError,
    FormatLinear,
    LowRankConfig,
    WaraConfig,
    factorize,
    summary,
    truncate,
)
from hf_lowrank.testing import tiny_model

from .conftest import CONFIGS, TARGETS, disturb, logits


MATRIX = [(format, method) for format in FORMATS.names() for method in sorted(CONFIGS)]
QKV = ["q_proj", "k_proj", "v_proj"]


# Further methods of PEFT that write weights, with the options that tiny layers need.
OTHERS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10}, "ADAMSS": {}, "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4}, "DEFT": {}, "DELORA": {}, "FOURIERFT": {"n_frequency": 8}, "FROD": {}, "GRALORA": {},
    "HIRA": {}, "HRA": {}, "IA3": {"feedforward_modules": []}, "LN_TUNING": {}, "LOKR": {"r": 2}, "MISS": {},
    "OFT": {"oft_block_size": 4, "r": 0}, "PEANUT": {}, "PSOFT": {}, "PVERA": {"r": 4}, "RANDLORA": {"r": 4},
    "ROAD": {}, "SHIRA": {}, "TINYLORA": {}, "UNILORA": {}, "VBLORA": {"num_vectors": 16, "vector_length": 8},
}  # fmt: skip


def ranks(model):
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module.rank
        for name, module in model.named_modules()
        if isinstance(module, FormatLinear)
    }


def state(model):
    """Everything in factorized layers, and the objects themselves."""
    return [
        (n, t) for m in model.modules() if isinstance(m, FormatLinear) for n, t in m.state_dict(keep_vars=True).items()
    ]


def trained(model, method, **options):
    torch.manual_seed(2)
    return disturb(get_peft_model(model, CONFIGS[method](**options)))


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("format", "method"), MATRIX)
def test_merged_unmerged_and_unloaded(small, format, method):
    model = trained(small(format), method)
    plain, before = logits(small(format), small.inputs), state(model)
    expected = logits(model, small.inputs)
    assert not torch.allclose(expected, plain, atol=1e-4)
    model.merge_adapter()
    close(logits(model, small.inputs), expected)
    model.unmerge_adapter()
    assert all(one is other for (_, one), (_, other) in zip(before, state(model), strict=True))
    assert torch.equal(logits(model, small.inputs), expected)
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model, small.inputs), plain)
    merged = model.merge_and_unload()
    close(logits(merged, small.inputs), expected)
    assert [type(m) for m in merged.modules()] == [type(m) for m in small(format).modules()]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("format", FORMATS.names())
def test_rank_grows_by_that_of_the_adapter_and_by_no_more(small, format, method):
    before = ranks(small(format))
    model = trained(small(format), method, r=3)
    after = ranks(model.merge_and_unload())
    assert {name: after[name] - rank for name, rank in before.items()} == {
        name: 3 if name.endswith(tuple(TARGETS)) else 0 for name in before
    }


def test_the_factors_of_the_base_stay_as_they_are(small):
    base = small("low_rank").model.layers[0].self_attn.q_proj
    left, right = base.left.weight.clone(), base.right.weight.clone()
    model = trained(small("low_rank"), "lora", lora_alpha=6)
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    up, down = adapter.lora_B["default"].weight.clone(), adapter.lora_A["default"].weight.clone()
    layer = model.merge_and_unload().model.layers[0].self_attn.q_proj
    assert torch.equal(layer.left.weight, torch.cat([left, 1.5 * up], dim=1))
    assert torch.equal(layer.right.weight, torch.cat([right, down]))


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
@pytest.mark.parametrize("format", FORMATS.names())
def test_the_merged_model_is_an_ordinary_factorized_checkpoint(small, format, method, tmp_path):
    small(format).save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), method)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again, small.inputs), logits(merged, small.inputs))
    assert ranks(again) == ranks(merged) != ranks(small(format))
    assert {row.format for row in summary(again).rows} == {format}


@pytest.mark.parametrize("format", FORMATS.names())
def test_in_bfloat16(small, format):
    model = trained(small(format).to(torch.bfloat16), "lora")
    expected = logits(model, small.inputs)
    merged = model.merge_and_unload()
    assert all(tensor.dtype in (torch.bfloat16, torch.int32) for _, tensor in state(merged))
    # One rounding of the merged numbers to 8 bits.
    close(logits(merged, small.inputs), expected, atol=0.03)
    assert (
        ranks(merged)["model.layers.0.self_attn.q_proj"] == ranks(small(format))["model.layers.0.self_attn.q_proj"] + 4
    )


def test_adapters_in_bfloat16_are_merged_as_precisely_as_others(small):
    torch.manual_seed(2)
    model = disturb(get_peft_model(small().to(torch.bfloat16), CONFIGS["lora"](), autocast_adapter_dtype=False))
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    numbers = adapter.lora_A["default"].weight.clone()
    model.merge_adapter()
    assert adapter.get_base_layer().rank == ranks(small())["model.layers.0.self_attn.q_proj"] + 4
    assert adapter.lora_A["default"].weight.dtype == torch.bfloat16
    assert torch.equal(adapter.lora_A["default"].weight, numbers)


def test_several_adapters_are_merged_together(small):
    model = trained(small("pivoted"), "lora")
    model.add_adapter("second", CONFIGS["dora"](r=2))
    model.set_adapter("second")
    disturb(model, seed=3)
    model.base_model.set_adapter(["default"])
    plain = logits(small("pivoted"), small.inputs)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["default"])
        one = logits(model, small.inputs)
        model.merge_adapter(["second"])
    assert not torch.allclose(one, logits(model, small.inputs))
    with model.disable_adapter():
        assert torch.equal(logits(model, small.inputs), plain)


def test_full_rank_updates_end_at_full_rank_with_a_warning(small):
    model = trained(small("low_rank"), "waveft", n_frequency=2000)
    expected = logits(model, small.inputs)
    with pytest.warns(UserWarning, match=r"grown to the size of dense ones.*hf_lowrank.truncate\(model, rank\)"):
        merged = model.merge_and_unload()
    close(logits(merged, small.inputs), expected)
    assert max(ranks(merged).values()) == 64


def test_repeated_merges_grow_the_rank_and_truncation_brings_it_back(small):
    model, start = small("pivoted"), ranks(small("pivoted"))
    for _ in range(3):
        model = trained(model, "lora").merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    assert ranks(model)[name] == start[name] + 12
    before = model.get_submodule(name).dense_weight()
    lost = truncate(model, rank=start[name])
    assert ranks(model)[name] == start[name]
    found = (model.get_submodule(name).dense_weight() - before).norm() / before.norm()
    assert lost[name] == pytest.approx(found.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_bias_and_layers_with_bias(dtype):
    model, inputs = tiny_model("qwen2")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5)).to(dtype)
    torch.manual_seed(0)
    adapted = disturb(get_peft_model(model, CONFIGS["lora"](target_modules=["q_proj"], lora_bias=True)))
    expected = logits(adapted, inputs)
    bias = adapted.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().bias
    numbers = bias.clone()
    adapted.merge_adapter()
    close(logits(adapted, inputs), expected, atol=1e-6 if dtype == torch.float32 else 0.03)
    adapted.unmerge_adapter()
    again = adapted.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().bias
    assert again is bias
    assert torch.equal(again, numbers)


def test_a_broken_adapter_is_refused_and_the_layer_left_alone(small):
    model = trained(small(), "lora")
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    adapter.lora_A["default"].weight.data[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ArithmeticError, match="The merged weight holds 64 NaN"):
        adapter.merge()
    with pytest.raises(ValueError, match="NaNs detected"):
        adapter.merge(safe_merge=True)
    assert adapter.merged_adapters == []
    assert all(one is other for (_, one), (_, other) in zip(before, state(model), strict=True))


@pytest.fixture
def sharing():
    def make():
        model, inputs = tiny_model("llama")
        method = {"name": "basis_sharing", "joint_groups": [QKV], "share_layers": 1}
        return factorize(model, LowRankConfig(method=method, calibration=[inputs()], param_ratio=0.5)), inputs

    return make


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["v_proj", "q_proj"], QKV])
def test_merging_into_one_member_of_a_shared_basis_leaves_the_others_alone(sharing, targets, tmp_path):
    base, inputs = sharing()
    before = {name: m.dense_weight() for name, m in base.named_modules() if isinstance(m, FormatLinear)}
    model = trained(base, "lora", target_modules=targets)
    expected, plain = logits(model, inputs), state(model)
    if "q_proj" in targets:
        with pytest.warns(UserWarning, match="share a basis no longer do"):
            model.merge_adapter()
    else:
        model.merge_adapter()
    close(logits(model, inputs), expected)
    model.base_model.model.model.layers[0].self_attn.q_proj.unmerge() if "q_proj" in targets else None
    close(logits(model, inputs), expected)
    model.unmerge_adapter()
    assert all(one is other for (_, one), (_, other) in zip(plain, state(model), strict=True))
    assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    close(logits(merged, inputs), expected)
    for name, weight in before.items():
        if not name.endswith(tuple(targets)):
            assert torch.equal(merged.get_submodule(name).dense_weight(), weight)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


def test_a_mixed_model_merges_and_unmerges_one_by_one(small):
    model = get_peft_model(small(), CONFIGS["lora"](), mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=TARGETS))
    model.set_adapter(["default", "loha"])
    disturb(model)
    assert isinstance(model, PeftMixedModel)
    expected, before = logits(model, small.inputs), state(model)
    model.merge_adapter()
    close(logits(model, small.inputs), expected)
    model.unmerge_adapter()
    assert all(one is other for (_, one), (_, other) in zip(before, state(model), strict=True))
    close(logits(model.merge_and_unload(), small.inputs), expected)


@pytest.mark.parametrize("config", ["lora", "dora", "wara"])
@pytest.mark.parametrize("format", ["low_rank", "pivoted", "shared_basis"])
def test_cast_while_merged(small, format, config):
    make = CONFIGS.get(config, lambda: WaraConfig(r=4, target_modules=TARGETS))
    model = disturb(get_peft_model(small(format), make()))
    plain = copy.deepcopy(model).to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits(model, small.inputs), logits(plain, small.inputs))
    assert {tensor.dtype for _, tensor in state(model) if tensor.is_floating_point()} == {torch.bfloat16}


def test_quantized_factors_carry_adapters_and_refuse_to_merge(small):
    torchao = pytest.importorskip("torchao.quantization")
    model = small()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(version=2), lambda module, name: name.endswith((".left", ".right"))
    )
    plain = logits(model, small.inputs)
    configs = [*CONFIGS.values(), lambda: WaraConfig(r=4, target_modules=["q_proj", "up_proj"])]
    for config in configs:
        adapted = get_peft_model(model, config())
        if adapted.peft_config["default"].peft_type.value != "WAVEFT":
            close(logits(adapted, small.inputs), plain, atol=2e-6)
        disturb(adapted)
        assert not torch.allclose(logits(adapted, small.inputs), plain, atol=1e-4)
        with pytest.raises(ComputedWeightError, match="is a Int8Tensor; merge before the factors are quantized"):
            adapted.merge_adapter()
        adapted.unload()
    assert torch.equal(logits(model, small.inputs), plain)


def test_offloaded_factors_refuse_to_merge(small):
    model = trained(small(), "lora")
    model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().to("meta")
    with pytest.raises(ComputedWeightError, match="is offloaded; load the model without offloading"):
        model.merge_adapter()


def test_a_merged_adapter_is_merged_once(small):
    model = trained(small(), "lora")
    model.merge_adapter()
    grown = ranks(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert any("already merged" in str(entry.message) for entry in caught)
    assert ranks(model) == grown


def test_methods_out_of_the_tree_may_name_their_factors(small, monkeypatch):
    """What is not true of the merged weight is not believed."""
    model = trained(small(), "loha")
    expected, start = logits(model, small.inputs), ranks(small())["model.layers.0.self_attn.q_proj"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    basis, values, rows = torch.linalg.svd(layer.get_delta_weight("default").detach())
    true = basis[:, :4] * values[:4], rows[:4]
    for factors, rank in ((true, start + 4), ((2 * true[0], true[1]), start + 4), ((true[0], true[1] * 0), start + 4)):
        monkeypatch.setattr(type(layer), "get_delta_factors", lambda self, name, pair=factors: pair, raising=False)
        layer.merge()
        assert layer.get_base_layer().rank == rank
        close(logits(model, small.inputs), expected)
        layer.unmerge()


@pytest.mark.parametrize("names", [("default",), ["default"]])
def test_names_of_adapters_to_merge(small, names):
    model = trained(small(), "lora")
    expected = logits(model, small.inputs)
    close(logits(model.merge_and_unload(adapter_names=names), small.inputs), expected)


@pytest.mark.parametrize("method", sorted(OTHERS))
def test_methods_that_nobody_thought_of_here(small, method):
    torch.manual_seed(2)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=TARGETS, **OTHERS[method])
    model = get_peft_model(small(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    expected, before = logits(model, small.inputs), state(model)
    assert not torch.allclose(expected, logits(small(), small.inputs), atol=1e-4)
    model.merge_adapter()
    close(logits(model, small.inputs), expected)
    model.unmerge_adapter()
    assert all(one is other for (_, one), (_, other) in zip(before, state(model), strict=True))
    merged = model.merge_and_unload()
    close(logits(merged, small.inputs), expected)
    assert [type(m) for m in merged.modules()] == [type(m) for m in small().modules()]
