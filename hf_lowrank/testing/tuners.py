"""What every tuner promises. Needs PEFT."""

import copy
import tempfile

import peft
import torch

from ..errors import ConfigError, TargetError
from ._adapters import (
    CLOSE,
    adapter_base,
    assert_same,
    base_weights,
    declared,
    fill,
    gradients,
    logits,
    own_parameters,
    refused,
    tolerance,
)
from ._saved_adapters import check_saving


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


def check_tuner(config_cls, **options):
    """Assert the laws of tuners on `config_cls`, a class of PEFT configurations that has been registered.

    A new adapter changes no bit of the output; merging changes it by rounding only, and unmerging restores the
    bits of the weights; an adapter that is saved and loaded, here or in another process, gives the same output;
    adapters are switched, added up, disabled and deleted; converted to LoRA by PEFT the update is the same;
    gradient checkpointing gives the same gradients; bfloat16 works; `modules_to_save` are trained and saved. On
    linears with and without bias, Conv1D, and factorized layers, each of which counts as one linear.

    A tuner that one of these does not apply to declares so, by class attributes as in [`FactorTuner`]; without
    them all laws hold. Without `identity_at_start` a new adapter changes the output of a dense model; without
    `additive` a second active adapter is refused; without `merges_into_factors` merging into factorized layers is.
    With `branches` each is trained in turn, and together they reach every parameter.

    Args:
        config_cls (`type`): takes `target_modules`, `modules_to_save` and `task_type` beside the options.
        options: of every configuration made here.
    """
    for base in BASES:
        _check_base(base, config_cls(target_modules="all-linear", **options))
    _check_adapters(config_cls, options)
    _check_conversion(config_cls, options)
    _check_training(config_cls, options)
    for base in (BASES[0], BASES[3]):
        check_saving(base, config_cls, options)
    for cast in (True, False):
        _check_bfloat16(config_cls, options, cast)


def _check_start(model, inputs, config, before):
    same = torch.equal(logits(model, inputs), before)
    assert same == declared(config, "identity_at_start"), "a new adapter changes no bit, unless it says so"


def _check_base(base, config):
    model, inputs = adapter_base(*base)
    before = logits(model, inputs)
    count = len(dict(model.named_modules()))
    model = peft.get_peft_model(model, config)
    assert all(p.requires_grad == (n in own_parameters(model, config, "default")) for n, p in model.named_parameters())
    if base[1] is None or declared(config, "identity_at_start"):
        _check_start(model, inputs, config, before)
    fill(model, config)
    weights, adapted = base_weights(model), logits(model, inputs)
    assert (adapted - before).abs().max() > 1e-3, "an adapter changes the output"
    merges = base[1] is None or declared(config, "merges_into_factors")
    if merges:
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), adapted, **tolerance(config))
        model.unmerge_adapter()
    else:
        refused(TargetError, model.merge_adapter)
    assert_same(base_weights(model), weights)
    assert torch.equal(logits(model, inputs), adapted), "unmerging restores every bit"
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    if merges:
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits(merged, inputs), adapted, **tolerance(config))
    else:
        refused(TargetError, copy.deepcopy(model).merge_and_unload)
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
    weights = base_weights(model)
    if declared(first, "additive"):
        _check_sum(model, inputs, one, two)
    else:
        refused(ConfigError, model.base_model.set_adapter, ["default", "second"])
        assert torch.equal(logits(model, inputs), two), "a refusal changes nothing"
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model, inputs), one, **tolerance(first))
    if declared(first, "additive"):
        model.merge_adapter(["second"])
    else:
        refused(ConfigError, model.merge_adapter, ["second"])
        torch.testing.assert_close(logits(model, inputs), one, **tolerance(first))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before), "merged adapters are taken out where all are disabled"
    assert_same(base_weights(model), weights)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), one)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), one)
    assert not own_parameters(model, second, "second")


def _check_sum(model, inputs, one, two):
    model.base_model.set_adapter(["default", "second"])
    weights, both = base_weights(model), logits(model, inputs)
    assert min((both - one).abs().max(), (both - two).abs().max()) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    model.unmerge_adapter()


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


def _check_training(config_cls, options):
    model, inputs = adapter_base()
    before = logits(model, inputs)
    config = config_cls(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], **options)
    model = peft.get_peft_model(model, config)
    _check_start(model, inputs, config, before)
    fill(model, config)
    weights = base_weights(model.model.model)
    branches = declared(config, "branches")
    plain = gradients(model, inputs, branches)
    assert sum(".lm_head." in name for name in plain) == 1
    assert len(plain) == 1 + len(own_parameters(model, config, "default"))
    assert all(gradient.any() for gradient in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients(model, inputs, branches).items():
        torch.testing.assert_close(gradient, plain[name], **tolerance(config))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert_same(base_weights(model.model.model), weights)
    trained = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(adapter_base()[0], folder, is_trainable=True)
    assert torch.equal(logits(again, inputs), trained)
    assert set(gradients(again, inputs, branches)) == set(plain)


def _check_bfloat16(config_cls, options, cast):
    model, inputs = adapter_base()
    model = model.to(torch.bfloat16)
    before = logits(model, inputs)
    config = config_cls(target_modules="all-linear", **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    own = own_parameters(model, config, "default").values()
    assert {p.dtype for p in own} == {torch.float32 if cast else torch.bfloat16}
    _check_start(model, inputs, config, before)
    fill(model, config)
    weights, adapted = base_weights(model), logits(model, inputs)
    assert adapted.dtype == torch.bfloat16
    branches = declared(config, "branches")
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, inputs, branches).values())
    model.merge_adapter()
    error = (logits(model, inputs) - adapted).float().norm() / adapted.float().norm()
    assert error < 0.05, "bfloat16 rounds the merged weights to 3 digits"
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)
