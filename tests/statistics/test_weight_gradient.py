"""The gradient of the calibration loss with respect to each weight."""

import pytest
import torch
from torch import nn

from hf_lowrank import CalibrationError, LowRankConfig, collect_statistics, factorize
from hf_lowrank.integrations.calibration import Labelled
from hf_lowrank.statistics.collect import collect
from hf_lowrank.statistics.sequential import collect_sequentially
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


def batches_of(inputs, model, count=2):
    """Batches of different lengths, one padded."""
    ids = inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return [*Labelled(model, [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :5]}][:count])]


def by_autograd(model, batches):
    """Gradients of the loss summed over labelled tokens, of which transformers' mean drops the first."""
    for batch in batches:
        (model(**batch).loss * (batch["labels"] != -100).sum()).backward()
    return {site.name: model.get_parameter(site.weight_name).grad.double() for site in match_sites(model)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_it_is_what_autograd_says(architecture):
    model, inputs = tiny_model(architecture)
    batches = batches_of(inputs, model)
    found = collect(model, match_sites(model), ["weight_gradient"], batches)
    for name, gradient in by_autograd(model.eval(), batches).items():
        (tensor,) = found.get(name, ["weight_gradient"]).values()
        expected = gradient.T if architecture == "gpt2" else gradient
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_block_by_block_it_is_the_same(tmp_path):
    model, inputs = tiny_model("llama")
    given = match_sites(model), ["weight_gradient", "input_gram"], batches_of(inputs, model)
    one, other = collect(model, *given), collect_sequentially(model, *given, tmp_path)
    for site in given[0]:
        for name, tensor in one.get(site.name, given[1]).items():
            torch.testing.assert_close(other.get(site.name, given[1])[name], tensor, rtol=1e-5, atol=1e-6)


def test_tokens_of_text_are_its_labels_and_padding_is_none():
    model, inputs = tiny_model("llama")
    padded, short = batches_of(inputs, model)
    assert (padded["labels"][0, -3:] == -100).all()
    assert torch.equal(padded["labels"][1], padded["input_ids"][1])
    assert torch.equal(short["labels"], short["input_ids"])
    own = torch.full_like(short["input_ids"], 7)
    assert next(iter(Labelled(model, [{**short, "labels": own}])))["labels"] is own


def test_layers_that_the_loss_does_not_reach_have_none():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 6)

        def forward(self, input, labels):
            self.idle(input)
            return {"loss": self.used(input).square().mean()}

    model = Apart()
    batch = {"input": torch.randn(3, 4), "labels": torch.zeros(3)}
    found = collect(model, match_sites(model), ["weight_gradient"], [batch])
    assert found.get("used", ["weight_gradient"])["weight_gradient"].any()
    (idle,) = found.get("idle", ["weight_gradient"]).values()
    assert idle.shape == (6, 4)
    assert not idle.any()


def test_without_labels_it_is_refused():
    model, inputs = tiny_model("bert")
    config = LowRankConfig("whitened_svd", 0.6, allocation="sensitivity")
    with pytest.raises(CalibrationError, match="batches without `labels`, and Bert"):
        factorize(model, config, calibration=[inputs()])
    model, inputs = tiny_model("llama")
    with pytest.raises(CalibrationError, match=r"'sensitivity' reads \['weight_gradient'\], and on text sampled"):
        factorize(model, config)
    with pytest.raises(CalibrationError, match="noise about zero; give real text"):
        collect_statistics(model, method="svd", allocation="sensitivity")
