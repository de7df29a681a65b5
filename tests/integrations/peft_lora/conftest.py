"""A tiny factorized model for every format, and every PEFT method that is promised for it."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, VeraConfig, WaveFTConfig

from hf_lowrank import FORMATS, LowRankConfig, factorize
from hf_lowrank.testing import tiny_model


TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": lambda **kw: LoraConfig(**{"r": 4, "target_modules": TARGETS, **kw}),
    "dora": lambda **kw: LoraConfig(**{"r": 4, "use_dora": True, "target_modules": TARGETS, **kw}),
    "loha": lambda **kw: LoHaConfig(**{"r": 2, "target_modules": TARGETS, **kw}),
    "vera": lambda **kw: VeraConfig(**{"r": 4, "target_modules": TARGETS, **kw}),
    "waveft": lambda **kw: WaveFTConfig(**{"n_frequency": 16, "target_modules": TARGETS, **kw}),
}


@pytest.fixture(scope="session")
def factorized_models():
    made = {}
    for name in FORMATS.names():
        model, inputs = tiny_model("llama")
        made[name] = factorize(model, LowRankConfig(method="svd", format=name, param_ratio=0.5))
    return made, inputs


@pytest.fixture
def small(factorized_models):
    """`small(format)`: a fresh copy of the model in that format; `small.inputs()`."""

    def make(name="low_rank"):
        return copy.deepcopy(factorized_models[0][name])

    make.inputs = factorized_models[1]
    return make


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs()).logits


def disturb(model, scale=0.05, seed=0):
    """Give everything trainable other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model
