"""Hooks that a user has put on a linear layer stay on whatever takes its place, and go when they are removed."""

import pytest
import torch

from hf_lowrank import FormatLinear, LowRankConfig, factorize, to_dense, truncate
from hf_lowrank.testing import tiny_model


LAYERS = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}


def factorized(model):
    factorize(model, LowRankConfig(method="svd", rank=4))


def in_another_format(model):
    factorized(model)
    truncate(model, rank=3, format="pivoted")


def dense_again(model):
    factorized(model)
    to_dense(model)


@pytest.mark.parametrize("change", [factorized, in_another_format, dense_again])
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_stay_and_can_be_removed(name, change):
    model, inputs = tiny_model(name)
    seen = []
    layer = model.get_submodule(LAYERS[name])
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
        layer.register_forward_hook(lambda module, args, kwargs, output: seen.append(output.shape), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape)),
    ]
    model(**inputs()).logits.sum().backward()
    expected, seen[:] = list(seen), []
    assert len(expected) == 3
    change(model)
    assert model.get_submodule(LAYERS[name]) is not layer
    model(**inputs()).logits.sum().backward()
    assert seen == expected
    for handle in handles:
        handle.remove()
    model(**inputs()).logits.sum().backward()
    assert seen == expected


def test_a_hook_that_changes_the_output_still_does():
    model, inputs = tiny_model("vit")
    model.eval()
    name = next(n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".0." in n)
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0)
    factorize(model, LowRankConfig(method="svd", rank=4))
    assert isinstance(model.get_submodule(name), FormatLinear)
    with torch.no_grad():
        hooked = model.get_submodule(name)(torch.ones(1, model.get_submodule(name).in_features))
    assert not hooked.any()
