"""Tiny models for adapters, and what is looked at in them."""

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ..integrations import LowRankConfig, factorize
from .models import tiny_model


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
