"""What every tuner promises. Needs PEFT."""

import copy
import os
import subprocess
import sys
import tempfile

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ..errors import TargetError
from ..integrations import LowRankConfig, factorize
from .models import tiny_model


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
        config_cls (`type`): takes `target_modules` and `modules_to_save` beside the options.
        options: of every configuration made here.
    """
    for base in BASES:
        _check_base(*_base(*base), config_cls(target_modules="all-linear", **options))
    _check_adapters(config_cls, options)
    _check_conversion(config_cls, options)
    _check_saving(config_cls, options)
    _check_training(config_cls, options)
    for cast in (True, False):
        _check_bfloat16(config_cls, options, cast)


def _base(architecture="llama", method=None, format=None):
    """A tiny model, factorized if there is a `method`, and inputs for it."""
    model, inputs = tiny_model(architecture)
    if method is not None:
        config = LowRankConfig(method=method, format=format, param_ratio=0.5, rank_multiple=1)
        factorize(model, config, calibration=[inputs()])
    return model, inputs()


def _logits(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def _own(model, config, adapter):
    """Parameters of an adapter, by name."""
    prefix = "." + PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    return {n: p for n, p in model.named_parameters() if prefix in n and f".{adapter}" in n.rpartition(prefix)[2]}


def _fill(model, config, adapter="default", seed=0):
    """Give an adapter parameters that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    own = _own(model, config, adapter)
    assert own, "names of the parameters start with the prefix of the tuner, and hold the name of the adapter"
    for parameter in own.values():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def _weights(model):
    """Every tensor of a model that is no adapter's, as it is now."""
    inside = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") and ".base_layer." not in name for layer in inside)
    }


def _assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def _check_base(model, inputs, config):
    before = _logits(model, inputs)
    count = len(dict(model.named_modules()))
    model = peft.get_peft_model(model, config)
    assert all(p.requires_grad == (n in _own(model, config, "default")) for n, p in model.named_parameters())
    assert torch.equal(_logits(model, inputs), before), "a new adapter changes no bit"
    _fill(model, config)
    weights, adapted = _weights(model), _logits(model, inputs)
    assert (adapted - before).abs().max() > 1e-3, "an adapter changes the output"
    try:
        model.merge_adapter()
        torch.testing.assert_close(_logits(model, inputs), adapted, **CLOSE)
        model.unmerge_adapter()
    except TargetError:
        pass
    _assert_same(_weights(model), weights)
    assert torch.equal(_logits(model, inputs), adapted), "unmerging restores every bit"
    with model.disable_adapter():
        assert torch.equal(_logits(model, inputs), before)
    try:
        torch.testing.assert_close(_logits(copy.deepcopy(model).merge_and_unload(), inputs), adapted, **CLOSE)
    except TargetError:
        pass
    plain = model.unload()
    assert len(dict(plain.named_modules())) == count
    assert torch.equal(_logits(plain, inputs), before)


def _check_adapters(config_cls, options):
    model, inputs = _base()
    before = _logits(model, inputs)
    # PEFT leaves a layer as it is that has none of the adapters to merge: so both sit on the same layers.
    first, second = (config_cls(target_modules=["q_proj", "up_proj"], **options) for _ in range(2))
    model = peft.get_peft_model(model, first)
    model.add_adapter("second", second)
    _fill(model, first, seed=1)
    _fill(model, second, "second", seed=2)
    one = _logits(model, inputs)
    model.set_adapter("second")
    two = _logits(model, inputs)
    assert (one - two).abs().max() > 1e-3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(_own(model, second, "second"))
    model.base_model.set_adapter(["default", "second"])
    weights, both = _weights(model), _logits(model, inputs)
    assert min((both - one).abs().max(), (both - two).abs().max()) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(_logits(model, inputs), both, **CLOSE)
    model.unmerge_adapter()
    _assert_same(_weights(model), weights)
    model.merge_adapter(["default"])
    torch.testing.assert_close(_logits(model, inputs), one, **CLOSE)
    model.merge_adapter(["second"])
    torch.testing.assert_close(_logits(model, inputs), both, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(_logits(model, inputs), before), "merged adapters are taken out where all are disabled"
    _assert_same(_weights(model), weights)
    model.set_adapter("default")
    assert torch.equal(_logits(model, inputs), one)
    model.delete_adapter("second")
    assert torch.equal(_logits(model, inputs), one)
    assert not _own(model, second, "second")


def _check_conversion(config_cls, options):
    model, inputs = _base()
    config = config_cls(target_modules=["q_proj", "o_proj"], **options)
    model = peft.get_peft_model(model, config)
    _fill(model, config)
    adapted = _logits(model, inputs)
    lora, state = peft.convert_to_lora(model, rank=min(model.model.lm_head.weight.shape))
    again = peft.get_peft_model(_base()[0], lora)
    peft.set_peft_model_state_dict(again, state)
    torch.testing.assert_close(_logits(again, inputs), adapted, rtol=1e-4, atol=1e-5)


def _check_saving(config_cls, options):
    model, inputs = _base()
    config = config_cls(target_modules="all-linear", **options)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = os.path.join(folder, "base"), os.path.join(folder, "adapter")
        model.save_pretrained(base)
        model = peft.get_peft_model(model, config)
        _fill(model, config)
        adapted = _logits(model, inputs)
        model.save_pretrained(adapter)
        torch.save(inputs, os.path.join(folder, "inputs.pt"))
        for low_cpu_mem_usage in (False, True):
            again = peft.PeftModel.from_pretrained(_base()[0], adapter, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(_logits(again, inputs), adapted)
            assert not any(p.requires_grad for p in again.parameters())
        # Another name, beside an adapter that is there.
        again.load_adapter(adapter, "other")
        again.set_adapter("other")
        assert torch.equal(_logits(again, inputs), adapted)
        # transformers' own loading, without a PeftModel.
        alone = _base()[0]
        alone.load_adapter(adapter)
        assert torch.equal(_logits(alone, inputs), adapted)
        alone.delete_adapter("default")
        code = FRESH.format(module=config_cls.__module__, folder=folder)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(os.path.join(folder, "logits.pt")), adapted, **CLOSE)


def _check_training(config_cls, options):
    model, inputs = _base()
    before = _logits(model, inputs)
    config = config_cls(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], **options)
    model = peft.get_peft_model(model, config)
    assert torch.equal(_logits(model, inputs), before)
    _fill(model, config)
    weights = _weights(model.model.model)
    plain = _gradients(model, inputs)
    assert sum(".lm_head." in name for name in plain) == 1
    assert len(plain) == 1 + len(_own(model, config, "default"))
    assert all(gradient.any() for gradient in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in _gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[name], **CLOSE)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    _assert_same(_weights(model.model.model), weights)
    trained = _logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(_logits(model, inputs), before)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(_base()[0], folder, is_trainable=True)
    assert torch.equal(_logits(again, inputs), trained)
    assert set(_gradients(again, inputs)) == set(plain)


def _gradients(model, inputs):
    model.train()
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check_bfloat16(config_cls, options, cast):
    model, inputs = _base()
    model = model.to(torch.bfloat16)
    before = _logits(model, inputs)
    config = config_cls(target_modules="all-linear", **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    own = _own(model, config, "default").values()
    assert {p.dtype for p in own} == {torch.float32 if cast else torch.bfloat16}
    assert torch.equal(_logits(model, inputs), before)
    _fill(model, config)
    weights, adapted = _weights(model), _logits(model, inputs)
    assert adapted.dtype == torch.bfloat16
    assert all(torch.isfinite(gradient).all() for gradient in _gradients(model, inputs).values())
    model.merge_adapter()
    error = (_logits(model, inputs) - adapted).float().norm() / adapted.float().norm()
    assert error < 0.05, "bfloat16 rounds the merged weights to 3 digits"
    model.unmerge_adapter()
    _assert_same(_weights(model), weights)
