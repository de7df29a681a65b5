"""What every tuner promises. Needs PEFT."""

import copy
import os
import subprocess
import sys
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM

from ..errors import TargetError
from ._adapters import adapter_base, assert_same, base_weights, fill, logits, own_parameters


# float32: merging rounds the weight once, and sums come in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# (architecture, method of its factorized layers, their format): linears without and with bias, Conv1D, and factors.
GROUPED = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q_proj", "k_proj", "v_proj"]]}
BASES = (
    ("llama", None, None),
    ("qwen2", None, None),
    ("gpt2", None, None),
    ("llama", "svd", "low_rank"),
    ("qwen2", "svd", "pivoted"),
    ("llama", GROUPED, None),
)
FRESH = """
import importlib, os, torch
importlib.import_module({module!r})
import peft
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(os.path.join({folder!r}, "base"))
model = peft.PeftModel.from_pretrained(model, os.path.join({folder!r}, "adapter"))
with torch.no_grad():
    logits = model(**torch.load(os.path.join({folder!r}, "inputs.pt"))).logits
torch.save(logits, os.path.join({folder!r}, "logits.pt"))
"""


def check_tuner(config_cls, **options):
    """Assert the laws of tuners on `config_cls`, a class of PEFT configurations that has been registered.

    A new adapter changes no bit of the output; merging changes it by rounding only, or is refused, and unmerging
    restores the bits of the weights; an adapter that is saved and loaded, here or in another process, gives the same
    output; adapters are switched, added up, disabled and deleted; converted to LoRA by PEFT the update is the same;
    gradient checkpointing gives the same gradients; bfloat16 works; `modules_to_save` are trained and saved. On
    linears with and without bias, Conv1D, and factorized layers, each of which counts as one linear.

    Args:
        config_cls (`type`): takes `target_modules`, `modules_to_save` and `task_type` beside the options.
        options: of every configuration made here.
    """
    for base in BASES:
        _check_base(base, config_cls(target_modules="all-linear", **options))
    _check_adapters(config_cls, options)
    _check_conversion(config_cls, options)
    _check_training(config_cls, options)
    _check_saving(config_cls, options)
    for cast in (True, False):
        _check_bfloat16(config_cls, options, cast)


def _check_base(base, config):
    model, inputs = adapter_base(*base)
    before = logits(model, inputs)
    count = len(dict(model.named_modules()))
    model = peft.get_peft_model(model, config)
    assert all(p.requires_grad == (n in own_parameters(model, config, "default")) for n, p in model.named_parameters())
    assert torch.equal(logits(model, inputs), before), "a new adapter changes no bit"
    fill(model, config)
    weights, adapted = base_weights(model), logits(model, inputs)
    assert (adapted - before).abs().max() > 1e-3, "an adapter changes the output"
    try:
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), adapted, **CLOSE)
        model.unmerge_adapter()
    except TargetError:
        pass
    assert_same(base_weights(model), weights)
    assert torch.equal(logits(model, inputs), adapted), "unmerging restores every bit"
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    try:
        torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload(), inputs), adapted, **CLOSE)
    except TargetError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(adapter_base(*base)[0], folder)
    assert torch.equal(logits(again, inputs), adapted)
    plain = model.unload()
    assert len(dict(plain.named_modules())) == count
    assert torch.equal(logits(plain, inputs), before)


def _check_adapters(config_cls, options):
    model, inputs = adapter_base()
    before = logits(model, inputs)
    # PEFT leaves a layer as it is that has none of the adapters to merge: so both sit on the same layers.
    first, second = (config_cls(target_modules=["q_proj", "up_proj"], **options) for _ in range(2))
    model = peft.get_peft_model(model, first)
    model.add_adapter("second", second)
    fill(model, first, seed=1)
    fill(model, second, "second", seed=2)
    one = logits(model, inputs)
    model.set_adapter("second")
    two = logits(model, inputs)
    assert (one - two).abs().max() > 1e-3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own_parameters(model, second, "second"))
    model.base_model.set_adapter(["default", "second"])
    weights, both = base_weights(model), logits(model, inputs)
    assert min((both - one).abs().max(), (both - two).abs().max()) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model, inputs), one, **CLOSE)
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before), "merged adapters are taken out where all are disabled"
    assert_same(base_weights(model), weights)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), one)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), one)
    assert not own_parameters(model, second, "second")


def _check_conversion(config_cls, options):
    model, inputs = adapter_base()
    config = config_cls(target_modules=["q_proj", "o_proj"], **options)
    model = peft.get_peft_model(model, config)
    fill(model, config)
    adapted = logits(model, inputs)
    lora, state = peft.convert_to_lora(model, rank=min(model.model.lm_head.weight.shape))
    again = peft.get_peft_model(adapter_base()[0], lora)
    peft.set_peft_model_state_dict(again, state)
    torch.testing.assert_close(logits(again, inputs), adapted, rtol=1e-4, atol=1e-5)


def _check_saving(config_cls, options):
    config = config_cls(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = os.path.join(folder, "base"), os.path.join(folder, "adapter")
        model, inputs = adapter_base()
        model.save_pretrained(base)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        fill(model, config)
        adapted = logits(model, inputs)
        model.save_pretrained(adapter)
        torch.save(inputs, os.path.join(folder, "inputs.pt"))
        for low_cpu_mem_usage in (False, True):
            again = peft.PeftModel.from_pretrained(adapter_base()[0], adapter, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits(again, inputs), adapted)
            assert not any(p.requires_grad for p in again.parameters())
        # Another name, beside an adapter that is there.
        again.load_adapter(adapter, "other")
        again.set_adapter("other")
        assert torch.equal(logits(again, inputs), adapted)
        assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter), inputs), adapted)
        # transformers' own loading, without a PeftModel.
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter), inputs), adapted)
        alone, before = adapter_base()[0], logits(adapter_base()[0], inputs)
        alone.load_adapter(adapter)
        assert torch.equal(logits(alone, inputs), adapted)
        alone.delete_adapter("default")
        assert torch.equal(logits(alone, inputs), before)
        code = FRESH.format(module=config_cls.__module__, folder=folder)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(os.path.join(folder, "logits.pt")), adapted, **CLOSE)


def _check_training(config_cls, options):
    model, inputs = adapter_base()
    before = logits(model, inputs)
    config = config_cls(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], **options)
    model = peft.get_peft_model(model, config)
    assert torch.equal(logits(model, inputs), before)
    fill(model, config)
    weights = base_weights(model.model.model)
    plain = _gradients(model, inputs)
    assert sum(".lm_head." in name for name in plain) == 1
    assert len(plain) == 1 + len(own_parameters(model, config, "default"))
    assert all(gradient.any() for gradient in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in _gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[name], **CLOSE)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert_same(base_weights(model.model.model), weights)
    trained = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(adapter_base()[0], folder, is_trainable=True)
    assert torch.equal(logits(again, inputs), trained)
    assert set(_gradients(again, inputs)) == set(plain)


def _gradients(model, inputs):
    model.train()
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check_bfloat16(config_cls, options, cast):
    model, inputs = adapter_base()
    model = model.to(torch.bfloat16)
    before = logits(model, inputs)
    config = config_cls(target_modules="all-linear", **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    own = own_parameters(model, config, "default").values()
    assert {p.dtype for p in own} == {torch.float32 if cast else torch.bfloat16}
    assert torch.equal(logits(model, inputs), before)
    fill(model, config)
    weights, adapted = base_weights(model), logits(model, inputs)
    assert adapted.dtype == torch.bfloat16
    assert all(torch.isfinite(gradient).all() for gradient in _gradients(model, inputs).values())
    model.merge_adapter()
    error = (logits(model, inputs) - adapted).float().norm() / adapted.float().norm()
    assert error < 0.05, "bfloat16 rounds the merged weights to 3 digits"
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)
