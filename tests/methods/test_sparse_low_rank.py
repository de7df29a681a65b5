"""Low rank plus single entries of a trained weight."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    METHODS,
    ConfigError,
    LowRankConfig,
    SparseLowRankLinear,
    factorize,
    residual_adapter,
    summary,
    truncate,
)
from hf_lowrank.linalg import truncated_svd
from hf_lowrank.testing import make_weight, tiny_model


SparseLowRank = METHODS["sparse_low_rank"]


def spiked(rows=40, columns=30, rank=3, spikes=36):
    """A weight of low rank and some large entries, which no low rank can hold."""
    u, _, v = torch.linalg.svd(make_weight(rows, columns), full_matrices=False)
    weight = 6 * u[:, :rank] @ v[:rank]
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(rows * columns, generator=generator)[:spikes]
    values = torch.ones(spikes, dtype=torch.float64)
    return weight.flatten().index_add(0, places, values).view(rows, columns), places.sort().values


def error(weight, factors):
    return float((weight - factors.product()).norm() / weight.norm())


def test_no_sweep_makes_it_worse_and_the_first_is_below_svd():
    weight = make_weight(24, 40, decay=0.97)
    errors = [error(weight, SparseLowRank(sweeps=sweeps).factorize(weight, 6, {})) for sweeps in range(1, 7)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(errors, errors[1:], strict=False))
    left, right, _ = truncated_svd(weight, 6)
    assert errors[0] < float((weight - left @ right).norm() / weight.norm())


def test_large_entries_are_found_and_the_rest_is_low_rank():
    weight, places = spiked()
    found = SparseLowRank(density=0.03, sweeps=60).factorize(weight, 3, {})
    row, column = found.rest.indices()
    assert torch.equal(row * 30 + column, places)
    assert error(weight, found) < 1e-6
    # Two factors of the same cost are far from it.
    rank = SparseLowRankLinear.cost(40, 30, 3, nonzeros=36) // 70
    left, right, _ = truncated_svd(weight, rank)
    assert float((weight - left @ right).norm() / weight.norm()) > 0.1


def test_without_entries_it_is_plain_svd():
    weight = make_weight(24, 40)
    found = SparseLowRank(density=0).factorize(weight, 5, {})
    left, right, _ = truncated_svd(weight, 5)
    assert found.rest is None
    torch.testing.assert_close(found.product(), left @ right)


@pytest.fixture
def model():
    made, _ = tiny_model("qwen2")
    return factorize(made, LowRankConfig(method={"name": "sparse_low_rank", "density": 0.05}, rank=4))


def logits(model):
    with torch.no_grad():
        return model(**tiny_model("qwen2")[1]()).logits


def test_a_budget_counts_values_and_places(tmp_path):
    made, _ = tiny_model("llama")
    factorize(made, LowRankConfig(method="sparse_low_rank", param_ratio=0.5, rank_multiple=1))
    rows = summary(made).rows
    assert 0.48 < sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows) <= 0.5
    made.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    made, _ = tiny_model("llama")
    factorize(made, LowRankConfig(method="sparse_low_rank", target_bytes=size, rank_multiple=1))
    made.save_pretrained(tmp_path / "bytes")
    assert 0.97 * size < (tmp_path / "bytes" / "model.safetensors").stat().st_size <= size


def test_lower_ranks_keep_the_entries_and_say_what_is_lost(model):
    name = "model.layers.1.mlp.up_proj"
    before = model.get_submodule(name).exact_weight()
    places = model.get_submodule(name).indices.clone()
    lost = truncate(model, rank=2)
    layer = model.get_submodule(name)
    assert (layer.rank, layer.nonzeros) == (2, len(places))
    assert torch.equal(layer.indices, places)
    found = float((layer.exact_weight() - before).norm() / before.norm())
    assert found == pytest.approx(lost[name], rel=1e-4)
    values = torch.linalg.svdvals(before - layer.rest().to_dense())
    assert found == pytest.approx(float(values[2:].norm() / before.norm()), rel=1e-4)


def test_another_format_takes_the_whole_weight(model):
    name = "model.layers.1.mlp.up_proj"
    before = model.get_submodule(name).exact_weight()
    whole, lower = model, copy.deepcopy(model)
    assert truncate(whole, format="low_rank")[name] == 0
    torch.testing.assert_close(whole.get_submodule(name).exact_weight(), before, rtol=0, atol=1e-6)
    lost = truncate(lower, rank=4, format="low_rank")
    values = torch.linalg.svdvals(before)
    assert lost[name] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
    assert {summary(made).rows[0].format for made in (whole, lower)} == {"low_rank"}


def test_loras_are_appended_and_entries_stay(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    layer = merged.model.layers[0].self_attn.q_proj
    assert (layer.rank, layer.nonzeros) == (7, round(0.05 * 64 * 64))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_what_needs_two_factors_refuses_the_method(model):
    pytest.importorskip("peft", reason="peft is not installed")
    from hf_lowrank import MixedRankConfig

    dense, _ = tiny_model("qwen2")
    with pytest.raises(ConfigError, match="`method`='sparse_low_rank' makes what only layers of format"):
        truncate(model, 3, method="sparse_low_rank")
    with pytest.raises(ConfigError, match="`method`='sparse_low_rank' makes what only .* a LoRA holds two"):
        residual_adapter(copy.deepcopy(model), dense, rank=2, method="sparse_low_rank")
    with pytest.raises(ConfigError, match="'low_rank' cannot hold what `method`='sparse_low_rank' makes"):
        MixedRankConfig(method="sparse_low_rank")
    experts, _ = tiny_model("mixtral")
    with pytest.raises(ConfigError, match=r"makes layers of format 'sparse_low_rank', and .*experts"):
        factorize(experts, LowRankConfig(method="sparse_low_rank"))


def test_a_residual_adapter_corrects_what_is_left(model):
    pytest.importorskip("peft", reason="peft is not installed")
    dense, _ = tiny_model("qwen2")
    expected, before = logits(dense), logits(model)
    corrected = logits(residual_adapter(model, dense, rank=40))
    assert (corrected - expected).norm() < 0.6 * (before - expected).norm()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 1.1}, r"`density`=1.1 of sparse_low_rank must be a number in \[0, 1\]"),
        ({"sweeps": 0}, "`sweeps`=0 of sparse_low_rank must be an integer of at least 1"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        SparseLowRank(**options)
