"""Two linear maps in a row become one: exactly, only where there is nothing between, only where it is smaller."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lowrank import (
    CalibrationError,
    ConfigError,
    LowRankConfig,
    LowRankError,
    LowRankLinear,
    factorize,
    merge_linear,
    summary,
)
from hf_lowrank.testing import tiny_model


class Chain(nn.Module):
    """Linear maps with something between; `between` gets what the first puts out and the whole input."""

    def __init__(self, first=None, second=None, between=None, bias=True):
        super().__init__()
        self.first = nn.Linear(12, 40, bias=bias) if first is None else first
        self.second = nn.Linear(40, 20, bias=bias) if second is None else second
        self.between = between or (lambda module, hidden: hidden)

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


INPUTS = {"x": torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(1))}


def outputs(model, inputs=INPUTS):
    with torch.no_grad():
        made = model(**inputs)
    return getattr(made, "logits", made)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("targets", [None, ["first"], ["second"], ["first", "second"]])
def test_exact(targets, dtype, tolerance, bias):
    model, inputs = Chain(bias=bias).to(dtype), {"x": INPUTS["x"].to(dtype)}
    if targets:
        pattern = {"first": 4, "second": 5}
        config = LowRankConfig(method="svd", target_modules=targets, rank_pattern={t: pattern[t] for t in targets})
        factorize(model, config)
    before, size = outputs(model, inputs), count(model)
    assert merge_linear(model, inputs) == 1
    assert count(model) < size
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=tolerance)
    assert isinstance(model.first, nn.Identity)
    if targets:
        assert type(model.second) is LowRankLinear
        assert model.second.rank == (4 if "first" in targets else 5)
    else:
        assert type(model.second) is nn.Linear
    assert (model.second.bias is not None) == bias
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert merge_linear(model, inputs) == 0


def test_layers_that_store_their_weight_the_other_way_round():
    model = Chain(Conv1D(40, 12), Conv1D(20, 40))
    for layer in (model.first, model.second):
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.weight, std=0.2)
    before = outputs(model)
    assert merge_linear(model, INPUTS) == 1
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-5)
    assert type(model.second) is Conv1D
    assert model.second.weight.shape == (12, 20)


def test_a_chain_becomes_one():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 9)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Deep()
    before = outputs(model)
    assert merge_linear(model, INPUTS) == 3
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-6)
    assert [type(layer) for layer in model.layers] == [nn.Identity] * 3 + [nn.Linear]


def positive(module, hidden):
    # Active where it does nothing to these inputs.
    return F.relu(hidden + 0)


@pytest.mark.parametrize(
    "between",
    [
        positive,
        lambda module, hidden: F.hardtanh(hidden, -50, 50),
        lambda module, hidden: F.dropout(hidden, 0.5, module.training),
        lambda module, hidden: 2 * hidden,
        lambda module, hidden: hidden.flip(-1),
        lambda module, hidden: hidden + hidden.mean(),
        lambda module, hidden: hidden.half().float(),
        lambda module, hidden: hidden.flatten(0, 1),
    ],
    ids=["relu", "wide clamp", "dropout", "scale", "order", "shift", "rounding", "shape"],
)
def test_not_with_anything_between(between):
    model = Chain(between=between)
    if between is positive:
        model.first.bias.data.fill_(100.0)
        assert (outputs(model.first, {"input": INPUTS["x"]}) > 0).all()
    state = copy.deepcopy(model.state_dict())
    assert merge_linear(model, INPUTS) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_not_if_something_else_reads_it():
    class Residual(Chain):
        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden), hidden.sum()

    class Twice(Chain):
        def forward(self, x):
            return self.second(self.first(x)) + self.second(self.first(x + 1))

    class Two(Chain):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(40, 20)

        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden) + self.third(hidden)

    for model in (Residual(), Twice(), Two()):
        with torch.no_grad():
            before = model(**INPUTS)
            assert merge_linear(model, INPUTS) == 0
            torch.testing.assert_close(model(**INPUTS), before, rtol=0, atol=0)


def test_not_if_it_would_be_larger():
    model = Chain(nn.Linear(12, 3), nn.Linear(3, 20))
    assert merge_linear(model, INPUTS) == 0


def test_not_with_hooks_or_shared_weights():
    model = Chain()
    model.first.register_forward_hook(lambda module, args, output: None)
    assert merge_linear(model, INPUTS) == 0
    model = Chain(nn.Linear(12, 12), nn.Linear(12, 12))
    model.second.weight = model.first.weight
    assert merge_linear(model, INPUTS) == 0


def test_the_model_is_otherwise_as_it_was():
    model = Chain().train()
    model.first.requires_grad_(False)
    state = torch.get_rng_state()
    assert merge_linear(model, INPUTS) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.second.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    frozen = Chain().requires_grad_(False)
    merge_linear(frozen, INPUTS)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("architecture", ["llama", "bert", "deepseek_v3", "whisper"])
def test_transformers_have_something_between(architecture):
    model, inputs = tiny_model(architecture)
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, exclude_modules=None))
    before = outputs(model, inputs())
    assert merge_linear(model, inputs()) == 0
    assert torch.equal(outputs(model, inputs()), before)


def test_a_transformers_model_of_merged_layers_refuses_to_be_saved(tmp_path):
    model, inputs = tiny_model("llama")

    class Plain(type(model.model.layers[0].mlp)):
        """Without the activation, nothing is between."""

        def forward(self, x):
            return self.down_proj(self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.__class__ = Plain
    before = outputs(model, inputs())
    assert merge_linear(model, inputs()) == 2
    torch.testing.assert_close(outputs(model, inputs()), before, rtol=0, atol=1e-5)
    with pytest.raises(LowRankError, match="Layers of this LlamaForCausalLM are merged.*save it before"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert "layers" in str(summary(model))


def test_bad_arguments():
    with pytest.raises(ConfigError, match="`model` must be a torch.nn.Module, not dict"):
        merge_linear({}, INPUTS)
    with pytest.raises(CalibrationError, match="`inputs` must be a dict of tensors"):
        merge_linear(Chain(), INPUTS["x"])
    with pytest.raises(LowRankError, match="meta device"):
        merge_linear(Chain().to("meta"), INPUTS)
