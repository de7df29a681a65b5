"""Every PEFT method meets factorized layers under the names of the dense model, through every door of PEFT."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_lowrank
from hf_lowrank import FORMATS, ComputedWeightError, ConfigError, FormatLinear, TargetError, to_dense
from hf_lowrank.formats import LinearFace
from hf_lowrank.integrations.peft_lora import install
from hf_lowrank.testing import tiny_model

from .conftest import CONFIGS, TARGETS, disturb, logits


ROOT = Path(hf_lowrank.__file__).parents[1]


def fresh(code, *arguments, **env):
    """Run `code` in a new interpreter; what it prints last, as JSON."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def factors_of(model):
    return {
        f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, FormatLinear)
        for key, tensor in layer.state_dict().items()
    }


def test_importing_the_library_does_not_import_peft():
    code = "import sys, json, hf_lowrank; print(json.dumps([m for m in sys.modules if m.split('.')[0] == 'peft']))"
    assert fresh(code) == []


ORDER = """
import json
from hf_lowrank import LowRankConfig, factorize
from hf_lowrank.testing import tiny_model
from peft import VeraConfig, get_peft_model
small = factorize(tiny_model("llama")[0], LowRankConfig(method="svd", param_ratio=0.5))
model = get_peft_model(small, VeraConfig(r=4, target_modules="all-linear"))
print(json.dumps(model.base_model.targeted_module_names))
"""


@pytest.mark.parametrize("order", ["import peft, hf_lowrank", "import hf_lowrank, peft", "import transformers, peft"])
def test_patched_in_either_order_of_import(order):
    found = fresh(order + ORDER)
    assert len(found) == 2 * 7
    assert not [name for name in found if name.endswith(("left", "right"))]


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("format", FORMATS.names())
def test_nothing_changes_at_first_and_training_moves_the_adapter_alone(small, format, method):
    base = small(format)
    before, expected = {n: p.clone() for n, p in factors_of(base).items()}, logits(base, small.inputs)
    model = get_peft_model(base, CONFIGS[method]())
    torch.testing.assert_close(logits(model, small.inputs), expected, rtol=0, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(model.base_model.prefix in name for name in trained)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch, losses = {**small.inputs(), "labels": small.inputs()["input_ids"]}, []
    for _ in range(6):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = factors_of(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("format", FORMATS.names())
def test_an_adapter_means_what_it_means_on_the_dense_model(small, format, method):
    torch.manual_seed(1)
    adapted = disturb(get_peft_model(small(format), CONFIGS[method]()))
    torch.manual_seed(1)
    dense = disturb(get_peft_model(to_dense(small(format)), CONFIGS[method]()))
    # DoRA's magnitudes start at the norms of the rows, the same up to rounding.
    torch.testing.assert_close(logits(adapted, small.inputs), logits(dense, small.inputs), rtol=0, atol=2e-6)


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(model, sys.argv[2])
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    print(json.dumps(model(input_ids=ids).logits.flatten().tolist()))
"""


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("format", FORMATS.names())
def test_saved_and_loaded_again(small, format, method, tmp_path):
    small(format).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = disturb(get_peft_model(base, CONFIGS[method]()))
    expected = logits(model, small.inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, small.inputs), expected)
    if method in ("dora", "vera"):
        # transformers itself does not load them, onto dense models neither.
        return
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(other, small.inputs), expected)


def test_a_fresh_process_needs_no_import_and_no_config(small, tmp_path):
    small("pivoted").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = disturb(get_peft_model(base, CONFIGS["dora"]()))
    expected = logits(model, small.inputs)
    model.save_pretrained(tmp_path / "adapter")
    ids = json.dumps(small.inputs()["input_ids"].tolist())
    found = fresh(LOAD, tmp_path / "base", tmp_path / "adapter", ids)
    torch.testing.assert_close(torch.tensor(found), expected.flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS.names())
def test_all_linear_means_layers_and_not_their_factors(small, format):
    model = get_peft_model(small(format), CONFIGS["lora"](target_modules="all-linear"))
    dense = get_peft_model(tiny_model("llama")[0], CONFIGS["lora"](target_modules="all-linear"))
    assert model.base_model.targeted_module_names == dense.base_model.targeted_module_names
    model.add_adapter("second", CONFIGS["lora"](target_modules="all-linear"))
    assert model.base_model.targeted_module_names == dense.base_model.targeted_module_names


def test_the_factors_themselves_can_be_adapted(small):
    model = get_peft_model(small(), CONFIGS["lora"](target_modules=["left", "right"]))
    disturb(model)
    expected = logits(model, small.inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, small.inputs), expected, rtol=0, atol=1e-6)
    assert all(layer.rank == before.rank for layer, before in zip(formats(merged), formats(small()), strict=True))


def formats(model):
    return [module for module in model.modules() if isinstance(module, FormatLinear)]


def test_a_layer_and_its_factor_at_once_are_refused(small):
    with pytest.raises(ConfigError, match=r"`target_modules` names .*q_proj and its factor .*q_proj\.(left|right)"):
        get_peft_model(small(), CONFIGS["lora"](target_modules=["q_proj", "left", "right"]))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "lora_ga"])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_initializations_that_write_the_weight_are_refused(small, init, targets):
    model = small()
    classes = [type(module) for module in model.modules()]
    extra = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    with pytest.raises(ConfigError, match=f"`init_lora_weights`='{init}' takes .*which is factorized.*'gaussian'"):
        get_peft_model(model, CONFIGS["lora"](init_lora_weights=init, target_modules=targets, **extra))
    assert [type(module) for module in model.modules()] == classes
    adapted = get_peft_model(model, CONFIGS["lora"]())
    with pytest.raises(ConfigError, match=f"`init_lora_weights`='{init}' takes"):
        adapted.add_adapter("second", CONFIGS["lora"](init_lora_weights=init, target_modules=targets, **extra))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("format", FORMATS.names())
def test_whatever_writes_a_weight_ends_with_the_model_as_it_was(small, format, init, monkeypatch):
    monkeypatch.setattr(install, "WRITING_INITS", ("unknown",))
    model = small(format)
    expected, classes = logits(model, small.inputs), [type(module) for module in model.modules()]
    with pytest.raises(ComputedWeightError, match=r"changes the weights it adapts.*Use another method"):
        get_peft_model(model, CONFIGS["lora"](init_lora_weights=init))
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model, small.inputs), expected)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_other_initializations_work(small, init):
    model = get_peft_model(small(), CONFIGS["lora"](init_lora_weights=init))
    torch.testing.assert_close(logits(model, small.inputs), logits(small(), small.inputs), rtol=0, atol=1e-6)


def test_layers_are_linears_only_while_they_carry_adapters(small):
    base = small()
    classes = {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, CONFIGS["lora"]())
    faced = [name for name, layer in model.named_modules() if isinstance(layer, LinearFace)]
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in faced)
    assert all(name.endswith(("q_proj.base_layer", "down_proj.base_layer")) for name in faced)
    assert len(faced) == 2 * 2
    assert {name: type(module) for name, module in model.unload().named_modules()} == classes


def test_several_adapters_disable_and_delete(small):
    base = small()
    plain = logits(base, small.inputs)
    model = disturb(get_peft_model(base, CONFIGS["lora"]()))
    first = logits(model, small.inputs)
    model.add_adapter("second", CONFIGS["lora"](r=2))
    model.set_adapter("second")
    second = logits(disturb(model, seed=1), small.inputs)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, small.inputs), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, small.inputs), plain)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, small.inputs), second)


def test_through_transformers_own_door(small, tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(CONFIGS["lora"]())
    expected = logits(disturb(model), small.inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, small.inputs), expected)
    again.disable_adapters()
    assert torch.equal(logits(again, small.inputs), logits(small(), small.inputs))


def test_conv1d_layers_keep_the_layout_peft_expects():
    model, inputs = tiny_model("gpt2")
    hf_lowrank.factorize(model, hf_lowrank.LowRankConfig(method="svd", param_ratio=0.5))
    for method in ("lora", "dora"):
        adapted = get_peft_model(
            copy.deepcopy(model), CONFIGS[method](target_modules=["c_attn"], fan_in_fan_out=False)
        )
        torch.testing.assert_close(logits(adapted, inputs), logits(model, inputs), rtol=0, atol=2e-6)
        expected = logits(disturb(adapted), inputs)
        torch.testing.assert_close(logits(adapted.merge_and_unload(), inputs), expected, rtol=0, atol=2e-6)


def test_gradient_checkpointing_and_the_trainer(small, tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIGS["lora"]())
    row = {"input_ids": small.inputs()["input_ids"][0], "labels": small.inputs()["input_ids"][0]}
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], gradient_checkpointing=True, logging_steps=1, save_steps=4,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4").eval()
    assert torch.equal(logits(again, small.inputs), logits(model.eval(), small.inputs))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_adapted_models_are_copied_whole(small, copier):
    model = disturb(get_peft_model(small("shared_basis"), CONFIGS["lora"]()))
    twin = copier(model)
    expected = logits(model, small.inputs)
    twin.merge_adapter()
    torch.testing.assert_close(logits(twin, small.inputs), expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(model, small.inputs), expected)


def test_saving_the_base_or_making_it_dense_under_an_adapter_is_refused(small, tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIGS["lora"]())
    with pytest.raises(TargetError, match="q_proj carries adapters; save the PEFT model, or call merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path / "wrong")
    with pytest.raises(TargetError, match="q_proj carries adapters; call merge_and_unload"):
        to_dense(model)


def test_injected_without_a_peft_model(small):
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), small())
    assert torch.equal(logits(model, small.inputs), logits(small(), small.inputs))


def test_loaded_without_memory_for_two(small, tmp_path):
    model = disturb(get_peft_model(small(), CONFIGS["lora"]()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again, small.inputs), logits(model, small.inputs))


def test_a_parameter_of_a_factor_as_target(small):
    config = LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.right.weight"])
    model = disturb(get_peft_model(small(), config))
    expected = logits(model, small.inputs)
    torch.testing.assert_close(logits(model.merge_and_unload(), small.inputs), expected, rtol=0, atol=1e-6)


def test_weighted_adapters_and_conversion_to_lora(small):
    model = disturb(get_peft_model(small(), CONFIGS["lora"]()))
    model.add_weighted_adapter(["default"], [0.5], "mean", combination_type="cat")
    model.set_adapter("mean")
    expected = logits(model, small.inputs)
    torch.testing.assert_close(logits(model.merge_and_unload(), small.inputs), expected, rtol=0, atol=1e-6)
    loha = disturb(get_peft_model(small(), CONFIGS["loha"]()))
    _, tensors = convert_to_lora(loha, rank=4)
    assert len(tensors) == 2 * 2 * 2


def test_beside_factorized_experts():
    model, inputs = tiny_model("mixtral")
    hf_lowrank.factorize(model, hf_lowrank.LowRankConfig(method="svd", param_ratio=0.5))
    adapted = disturb(get_peft_model(model, CONFIGS["lora"](target_modules="all-linear")))
    expected = logits(adapted, inputs)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), inputs), expected, rtol=0, atol=1e-6)


def test_compiled(small):
    model = disturb(get_peft_model(small(), CONFIGS["dora"]()))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, small.inputs), logits(model, small.inputs), rtol=0, atol=1e-6)
