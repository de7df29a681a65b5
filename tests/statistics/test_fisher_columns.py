"""Column and row sums of the Fisher information, against squared weight gradients of one sample at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AlbertConfig, AlbertForSequenceClassification

from hf_lowrank import StatisticsError
from hf_lowrank.statistics.collect import collect
from hf_lowrank.statistics.fisher_columns import FisherColumns
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


NAME = "fisher_columns"


def by_sample(model, losses, axes=(0, 1)):
    """Independent of the library: autograd for the weights, one sample's loss at a time; columns are inputs."""
    sites = match_sites(model)
    weights = [model.get_parameter(site.weight_name) for site in sites]
    sums = [0] * len(sites)
    for loss in losses:
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        for i, (site, gradient) in enumerate(zip(sites, gradients, strict=True)):
            if gradient is not None:
                oriented = site.kind.oriented(model, site, gradient).double()
                sums[i] = sums[i] + oriented.square().sum(axes)
    return {site.name: found for site, found in zip(sites, sums, strict=True)}


def labelled(name):
    """A model, a batch of two samples with labels, and its loss as a function of the sample."""
    model, inputs = tiny_model(name)
    batch = inputs()
    if name == "vit":
        batch["labels"] = torch.tensor([0, 2])
        tokens = 1
    else:
        batch["labels"] = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5))
        tokens = 7
    if name == "t5":
        del batch["decoder_input_ids"]

    def loss(sample):
        return model(**{key: value[sample : sample + 1] for key, value in batch.items()}).loss * tokens

    return model, batch, loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "mixtral", "qwen3_moe"])
def test_is_the_sum_of_squared_gradients_of_single_samples(name):
    model, batch, loss = labelled(name)
    expected = by_sample(model, [lambda: loss(0), lambda: loss(1)])
    together = collect(model, match_sites(model), [NAME], [batch])
    one_by_one = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    apart = collect(model, match_sites(model), [NAME], one_by_one)
    for site, columns in expected.items():
        for statistics in (together, apart):
            found = statistics.get(site, [NAME])[NAME]
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, columns, rtol=1e-3, atol=1e-5 * float(columns.max()))


def test_the_square_of_a_batch_gradient_is_another_quantity():
    model, batch, loss = labelled("vit")
    squared_sum = by_sample(model, [lambda: loss(0) + loss(1)])
    found = collect(model, match_sites(model), [NAME], [batch])
    site = match_sites(model)[0].name
    assert not torch.allclose(found.get(site, [NAME])[NAME], squared_sum[site], rtol=0.05)


def test_without_labels_the_model_draws_them():
    model, inputs = tiny_model("llama")
    ids = inputs()["input_ids"]
    with torch.no_grad():
        cumulated = model(ids).logits.flatten(0, 1).softmax(-1).cumsum(-1)
    thresholds = cumulated[:, -1:] * torch.rand(14, 1, generator=torch.Generator().manual_seed(4))
    labels = torch.searchsorted(cumulated, thresholds, right=True).view(2, 7)

    def loss(sample):
        return cross_entropy(model(ids[sample : sample + 1]).logits[0], labels[sample], reduction="sum")

    expected = by_sample(model, [lambda: loss(0), lambda: loss(1)])
    found = collect(model, match_sites(model), [NAME], [inputs()], seed=4)
    for site, columns in expected.items():
        torch.testing.assert_close(found.get(site, [NAME])[NAME], columns, rtol=1e-3, atol=1e-5 * float(columns.max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_counted(side):
    model, inputs = tiny_model("llama")
    ids = inputs()["input_ids"]
    shape, positions = (2, 12), slice(5, 12) if side == "left" else slice(0, 7)
    batch = {"input_ids": torch.full(shape, 5), "attention_mask": torch.zeros(shape).long()}
    batch["labels"] = torch.full(shape, -100)
    batch["input_ids"][:, positions], batch["attention_mask"][:, positions], batch["labels"][:, positions] = (
        ids,
        1,
        ids,
    )
    if side == "left":
        # Else the model would predict the first real token from padding.
        batch["labels"][:, 5] = -100
    plain_labels = ids.clone()
    plain_labels[:, 0] = plain_labels[:, 0] if side == "right" else -100
    plain = collect(model, match_sites(model), [NAME], [{"input_ids": ids, "labels": plain_labels}])
    masked = collect(model, match_sites(model), [NAME], [batch])
    for site in match_sites(model):
        expected = plain.get(site.name, [NAME])[NAME]
        torch.testing.assert_close(masked.get(site.name, [NAME])[NAME], expected, rtol=1e-3, atol=1e-9)


def test_a_shared_layer_has_one_gradient():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=96, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(3, 96, (2, 7)), "labels": torch.tensor([0, 2])}

    def loss(sample):
        return model(**{key: value[sample : sample + 1] for key, value in batch.items()}).loss

    expected = by_sample(model, [lambda: loss(0), lambda: loss(1)])
    found = collect(model, match_sites(model), [NAME], [batch])
    for site, columns in expected.items():
        torch.testing.assert_close(found.get(site, [NAME])[NAME], columns, rtol=1e-3, atol=1e-5 * float(columns.max()))


def test_both_ways_to_square_agree():
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(10, n, dtype=torch.float64, generator=generator) for n in (600, 40))
    samples = torch.tensor([0] * 4 + [1] * 6)
    statistic = FisherColumns(40, x.device)
    statistic.update(x, g, samples, torch.zeros_like(samples))
    few = sum((g[samples == s].T @ x[samples == s]).square().sum(0) for s in (0, 1))
    torch.testing.assert_close(statistic.result(), few)
    many = FisherColumns(40, x.device)
    repeated = [tensor.repeat_interleave(10, dim=0) for tensor in (x, g, samples, torch.zeros_like(samples))]
    many.update(*repeated)
    torch.testing.assert_close(many.result(), few * 100)


def test_an_input_that_changes_in_place_is_noticed():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            y = self.linear(x)
            x.mul_(2)
            return {"logits": y}

    model = InPlace()
    with pytest.raises(StatisticsError, match="changes the input of linear in place"):
        collect(model, match_sites(model), [NAME], [{"x": torch.randn(2, 3, 4)}])


def test_losses_of_two_kinds_are_not_mixed():
    model, inputs = tiny_model("llama")
    with pytest.raises(StatisticsError, match="different losses"):
        collect(model, match_sites(model), [NAME, "gradient_gram"], [inputs()])


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral"])
def test_rows_are_the_sums_over_the_other_axis(name):
    model, batch, loss = labelled(name)
    expected = by_sample(model, [lambda: loss(0), lambda: loss(1)], axes=(0, 2))
    found = collect(model, match_sites(model), ["fisher_rows"], [batch])
    for site, rows in expected.items():
        found_rows = found.get(site, ["fisher_rows"])["fisher_rows"]
        torch.testing.assert_close(found_rows, rows, rtol=1e-3, atol=1e-5 * float(rows.max()))
