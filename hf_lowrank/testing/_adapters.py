"""Tiny models for adapters, and what is looked at in them."""

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ..draws import two_branch_layers
from ..integrations import LowRankConfig, factorize
from ..tuners import FactorTuner
from .models import tiny_model


# float32: merging rounds the weight once, and sums of the update come in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Where factors take the place of a weight, the sums over all inputs do, not only those of an update.
REPLACED = {"rtol": 1e-5, "atol": 5e-6}


def adapter_base(architecture="llama", method=None, format=None):
    """A tiny model, factorized if there is a `method`, and inputs for it."""
    model, inputs = tiny_model(architecture)
    if method is not None:
        config = LowRankConfig(method=method, format=format, param_ratio=0.5, rank_multiple=1)
        factorize(model, config, calibration=[inputs()])
    return model, inputs()


def logits(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def own_parameters(model, config, adapter):
    """Parameters of an adapter, by name."""
    prefix = "." + PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    return {n: p for n, p in model.named_parameters() if prefix in n and f".{adapter}" in n.rpartition(prefix)[2]}


def fill(model, config, adapter="default", seed=0):
    """Give an adapter parameters that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    own = own_parameters(model, config, adapter)
    assert own, "names of the parameters start with the prefix of the tuner, and hold the name of the adapter"
    for parameter in own.values():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def base_weights(model):
    """Every tensor of a model that is no adapter's, as it is now."""
    inside = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") and ".base_layer." not in name for layer in inside)
    }


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def declared(config, name):
    """A class attribute of the tuner that `config` is for, by default as [`FactorTuner`] has it."""
    return getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], name, getattr(FactorTuner, name))


def tolerance(config):
    """How far a merged layer may be from the layers that it was merged from."""
    return CLOSE if declared(config, "additive") else REPLACED


def refused(error, call, *arguments):
    """Assert that a call raises `error`."""
    try:
        call(*arguments)
    except error:
        return
    raise AssertionError(f"{call} has to raise {error.__name__}")


def gradients(model, inputs, branches):
    """Of every parameter that gets one, summed over the branches that training draws from."""
    model.train()
    model.zero_grad()
    for branch in branches or (None,):
        for layer in two_branch_layers(model).values():
            layer.drawn = branch
        model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
