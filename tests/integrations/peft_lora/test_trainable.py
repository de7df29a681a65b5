"""Train the weight of each component, or the factors, and nothing else."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lowrank import ConfigError, FormatLinear, LowRankConfig, TargetError, factorize, train_only, truncate
from hf_lowrank.testing import tiny_model

from .conftest import CONFIGS, disturb, logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FormatLinear)}


def scales(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("format", ["low_rank", "shared_basis"])
def test_one_number_a_component_that_starts_at_one(small, format):
    base = small(format)
    ranks = [layer.rank for layer in layers(base).values()]
    expected = logits(base, small.inputs)
    model = train_only(base)
    assert model.get_nb_trainable_parameters()[0] == sum(ranks)
    assert all((p == 1).all() for p in scales(model).values())
    assert torch.equal(logits(model, small.inputs), expected)


def test_they_are_the_singular_values(small):
    """Factors by svd: what is trained scales the singular values of the weight, one by one."""
    model = train_only(small())
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    before = torch.linalg.svdvals(small().model.layers[0].self_attn.q_proj.dense_weight())[:16]
    factor = torch.linspace(2.0, 0.5, 16)
    model.get_submodule(name).left.ia3_l["default"].data.copy_(factor)
    weight = model.merge_and_unload().model.layers[0].self_attn.q_proj.dense_weight()
    torch.testing.assert_close(torch.linalg.svdvals(weight)[:16], before * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["low_rank", "shared_basis"])
def test_saved_small_loaded_and_folded(small, format, tmp_path):
    small(format).save_pretrained(tmp_path / "base")
    model = disturb(train_only(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    expected = logits(model, small.inputs)
    model.save_pretrained(tmp_path / "scales")
    size = (tmp_path / "scales" / "adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "base" / "model.safetensors").stat().st_size / 10
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "scales")
    assert torch.equal(logits(again, small.inputs), expected)
    folded = again.merge_and_unload()
    torch.testing.assert_close(logits(folded, small.inputs), expected, rtol=0, atol=1e-6)
    assert [layer.rank for layer in layers(folded).values()] == [
        layer.rank for layer in layers(small(format)).values()
    ]
    folded.save_pretrained(tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.equal(logits(loaded, small.inputs), logits(folded, small.inputs))


def test_members_of_a_shared_basis_have_a_scale_each():
    model, inputs = tiny_model("llama")
    method = {"name": "basis_sharing", "joint_groups": [["q_proj", "k_proj", "v_proj"]], "share_layers": 1}
    factorize(model, LowRankConfig(method=method, calibration=[inputs()], param_ratio=0.5))
    ranks = [layer.rank for layer in layers(model).values()]
    adapted = disturb(train_only(model))
    assert len(scales(adapted)) == len(ranks)
    expected = logits(adapted, inputs)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), inputs), expected, rtol=0, atol=1e-6)
    assert model.model.layers[0].self_attn.k_proj.lender is model.model.layers[0].self_attn.q_proj


def test_training_moves_nothing_else(small):
    model = train_only(small())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(scales(model).values(), 1e-2)
    batch, losses = {**small.inputs(), "labels": small.inputs()["input_ids"]}, []
    for _ in range(6):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen2"])
def test_factors_alone(architecture, capsys):
    model, _ = tiny_model(architecture)
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5))
    assert train_only(model, "factors") is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(("left.weight", "right.weight", "_left", "_right")) for name in trained)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for counted in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counted.print_trainable_parameters()
        assert f"trainable params: {total:,} || all params:" in capsys.readouterr().out


def test_auxiliary_cores_alone(capsys):
    model, inputs = tiny_model("llama")
    method = {"name": "tensor_train", "cores": 3}
    factorize(model, LowRankConfig(method=method, rank_pattern={"q_proj": 64, "down_proj": 12}, param_ratio=1.0))
    assert train_only(model, "auxiliary") is model
    for layer in layers(model).values():
        sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
        frozen = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
        assert frozen == {max(sizes, key=sizes.get)}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.print_trainable_parameters()
    assert f"trainable params: {sum(p.numel() for p in trained):,} || all params:" in capsys.readouterr().out
    held = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    batch, losses = {**inputs(), "labels": inputs()["input_ids"]}, []
    for _ in range(6):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in held.items())


def test_auxiliary_cores_are_as_few_as_the_paper_says():
    """Its shapes of an attention and a feed-forward weight, at full bonds: 11.1 % and 7.3 % of what is stored."""
    model = torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.Linear(768, 3072))
    in_shape, out_shape = {768: [3, 4, 4, 4, 4]}, {768: [4, 4, 4, 4, 3], 3072: [4, 4, 8, 6, 4]}
    method = {"name": "tensor_train", "out_shape": out_shape, "in_shape": in_shape}
    factorize(model, LowRankConfig(method=method, rank_pattern={"0|1": 768}))
    assert [layer.bonds for layer in model] == [(12, 192, 192, 12), (12, 192, 384, 16)]
    train_only(model, "auxiliary")
    for layer, share in zip(model, (0.111, 0.073), strict=True):
        cores = [p for name, p in layer.named_parameters() if name != "output_bias"]
        trained = sum(p.numel() for p in cores if p.requires_grad)
        assert trained / sum(p.numel() for p in cores) == pytest.approx(share, abs=0.001)


def test_only_chains_have_auxiliary_cores(small):
    with pytest.raises(TargetError, match=r"q_proj is stored as 'low_rank', not as a chain.*method='tensor_train'"):
        train_only(small(), "auxiliary")


def test_pivoted_layers_are_converted_first(small):
    model = small("pivoted")
    with pytest.raises(TargetError, match=r"stored as 'pivoted'.*hf_lowrank.truncate\(model, format='low_rank'\)"):
        train_only(model)
    expected = logits(model, small.inputs)
    truncate(model, format="low_rank")
    adapted = train_only(model)
    torch.testing.assert_close(logits(adapted, small.inputs), expected, rtol=0, atol=1e-6)


def test_quantized_factors_cannot_be_trained(small):
    torchao = pytest.importorskip("torchao.quantization")
    model = small()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(version=2), lambda module, name: name.endswith((".left", ".right"))
    )
    with pytest.raises(TargetError, match="quantized, and cannot be trained.*`part`='singular_values'"):
        train_only(model, "factors")
    assert train_only(model).get_nb_trainable_parameters()[0] > 0


def test_refusals(small):
    with pytest.raises(
        ConfigError, match=r"`part`='values' of train_only is not one of \['singular_values', 'factors', 'auxiliary'\]"
    ):
        train_only(small(), "values")
    with pytest.raises(TargetError, match="no factorized layer to train"):
        train_only(tiny_model("llama")[0])
    with pytest.raises(TargetError, match="carries adapters; call `merge_and_unload"):
        train_only(get_peft_model(small(), CONFIGS["lora"]()))
