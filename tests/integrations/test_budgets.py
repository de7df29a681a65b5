"""Budgets are met in the files that are written, or refused before work."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from hf_lowrank import FORMATS, ConfigError, LowRankConfig, LowRankLinear, factorize, register_format, summary
from hf_lowrank.formats import FormatLinear
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


NAMES = ["llama", "llama_tied", "gpt2", "t5", "mixtral"]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def step_of(model, itemsize=4, multiple=8):
    """Bytes of the largest single rank step, and of what the file headers are overestimated by."""
    steps = [s.copies * (s.out_features + s.in_features) * multiple * itemsize for s in match_sites(model)]
    experts = sum(2 * site.copies * 256 for site in match_sites(model) if site.copies > 1)
    return max(steps) + experts + 64 * len(model.state_dict()) + 4096


@pytest.fixture(params=NAMES)
def saved(request, tmp_path):
    model, _ = tiny_model(request.param)
    model.save_pretrained(tmp_path / "dense")
    return model, tmp_path / "dense"


@pytest.mark.parametrize("allocation", ["uniform", "knapsack", "energy"])
@pytest.mark.parametrize("share", [0.75, 0.9])
def test_target_bytes_is_met_from_below(saved, tmp_path, allocation, share):
    dense, folder = saved
    target = int(share * size_of(folder))
    config = LowRankConfig(method="svd", allocation=allocation, target_bytes=target)
    model = type(dense).from_pretrained(folder, lowrank_config=config)
    model.save_pretrained(tmp_path / "small")
    written = size_of(tmp_path / "small")
    assert target - step_of(dense) <= written <= target
    memory = factorize(type(dense).from_pretrained(folder), config)
    assert str(summary(memory)) == str(summary(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_target_bytes_counts_the_dtype_of_what_is_stored(tmp_path, name, dtype):
    """T5 keeps some layers in float32 when it is loaded in float16."""
    dense, _ = tiny_model(name)
    dense.save_pretrained(tmp_path / "dense")
    target = int(0.45 * size_of(tmp_path / "dense"))
    config = LowRankConfig(method="svd", target_bytes=target)
    model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "small")
    assert target - step_of(dense) <= size_of(tmp_path / "small") <= target


def test_a_larger_model_meets_the_target_to_half_a_percent(tmp_path):
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "vocab_size": 512}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense")
    target = int(0.7 * size_of(tmp_path / "dense"))
    options = [{"method": "svd", "allocation": name} for name in ("uniform", "knapsack", "lorap", "energy")]
    # The default: factors with an order of the rows, and ranks by loss.
    options.append({"calibration": [{"input_ids": torch.randint(3, 500, (4, 32))}]})
    for number, chosen in enumerate(options):
        config = LowRankConfig(**chosen, target_bytes=target)
        model = type(dense).from_pretrained(tmp_path / "dense", lowrank_config=config)
        model.save_pretrained(tmp_path / str(number))
        assert 0.995 * target <= size_of(tmp_path / str(number)) <= target
    assert {row.format for row in summary(model).rows} == {"pivoted"}


def test_pinned_ranks_count_against_target_bytes(saved, tmp_path):
    dense, folder = saved
    site = match_sites(dense)[0]
    target = int(0.85 * size_of(folder))
    config = LowRankConfig(method="svd", target_bytes=target, rank_pattern={site.name: 8})
    model = type(dense).from_pretrained(folder, lowrank_config=config)
    model.save_pretrained(tmp_path / "small")
    assert target - step_of(dense) <= size_of(tmp_path / "small") <= target


def test_a_target_out_of_reach_is_refused_before_work_with_the_least_that_is_possible(saved, tmp_path, monkeypatch):
    dense, folder = saved
    batches = [{"input_ids": torch.randint(3, 90, (2, 9))}]
    message = r"`target_bytes`=1000 cannot be reached: .* takes (\d+) bytes"
    for config in (
        LowRankConfig(method="svd", target_bytes=1000),
        LowRankConfig(method="svd", allocation="knapsack", target_bytes=1000),
        LowRankConfig(format="low_rank", target_bytes=1000, calibration=batches),
    ):
        monkeypatch.setattr("hf_lowrank.integrations.planning.collect", forbidden)
        monkeypatch.setattr("hf_lowrank.integrations.streaming.measure_site", forbidden)
        monkeypatch.setattr("hf_lowrank.integrations.streaming.factorize_site", forbidden)
        with pytest.raises(ConfigError, match=message) as streamed:
            type(dense).from_pretrained(folder, lowrank_config=config)
        with pytest.raises(ConfigError, match=message) as memory:
            factorize(type(dense).from_pretrained(folder), config)
        assert str(streamed.value) == str(memory.value)
    monkeypatch.undo()
    least = int(str(memory.value).partition("takes ")[2].split()[0])
    for allocation in ("uniform", "knapsack"):
        config = LowRankConfig(method="svd", allocation=allocation, target_bytes=least)
        model = type(dense).from_pretrained(folder, lowrank_config=config)
        model.save_pretrained(tmp_path / allocation)
        assert size_of(tmp_path / allocation) <= least
    lowest = {site.name: site.kind.min_rank_multiple for site in match_sites(dense)}
    assert {row.name: row.rank for row in summary(model).rows} == lowest, "all that the knapsack can choose"
    with pytest.raises(ConfigError, match="cannot be reached"):
        type(dense).from_pretrained(folder, lowrank_config=dataclasses.replace(config, target_bytes=least - 1))


def forbidden(*args, **kwargs):
    raise AssertionError("work before the budget was checked")


@pytest.fixture
def indexed_format():
    """A format that stores one 64-bit index a row beside its factors."""

    @register_format("indexed")
    class IndexedLinear(LowRankLinear):
        def __init__(self, in_features, out_features, *args, device=None, **kwargs):
            super().__init__(in_features, out_features, *args, device=device, **kwargs)
            self.register_buffer("order", torch.arange(out_features, device=device))

        @classmethod
        def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
            layer = super().from_factors(factors, bias, dtype, transposed)
            layer.order = torch.arange(layer.out_features)
            return layer

        @classmethod
        def stored_bytes(cls, out_features, in_features, rank, dtype_size):
            return super().stored_bytes(out_features, in_features, rank, dtype_size) + out_features * 8

    yield "indexed"
    del FORMATS._classes["indexed"]


def test_index_tensors_count(tmp_path, indexed_format):
    dense, _ = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    target = int(0.6 * size_of(tmp_path / "dense"))
    for format in ("low_rank", "pivoted", indexed_format):
        model = factorize(
            type(dense).from_pretrained(tmp_path / "dense"),
            LowRankConfig(method="svd", format=format, target_bytes=target, rank_multiple=1),
        )
        model.save_pretrained(tmp_path / format)
        assert target - step_of(dense, multiple=1) <= size_of(tmp_path / format) <= target
        with safe_open(tmp_path / format / "model.safetensors", "pt") as file:
            assert any(key.endswith(".order") for key in file.keys()) == (format != "low_rank")  # noqa: SIM118


def test_bytes_default_to_the_numbers_of_the_format():
    class Two(FormatLinear):
        @classmethod
        def cost(cls, out_features, in_features, rank):
            return 7 * rank

    assert Two.stored_bytes(3, 4, 5, 2) == 70


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy_keeps_the_least_rank_that_holds_enough(tmp_path, name, energy):
    """Against singular values computed here."""
    dense, _ = tiny_model(name)
    dense.save_pretrained(tmp_path)
    config = LowRankConfig(method="svd", energy=energy, rank_multiple=1)
    model = type(dense).from_pretrained(tmp_path, lowrank_config=config)
    ranks = {row.name: row.rank for row in summary(model).rows}
    assert ranks
    for site in match_sites(dense):
        values = torch.linalg.svdvals(site.kind.weight(dense, site).double()).square()
        kept = values.cumsum(-1).sum(0) / values.sum()
        expected = int((kept < energy).sum()) + 1
        least = site.kind.min_rank_multiple
        expected = -(-expected // least) * least
        even = LowRankLinear.break_even(site.out_features, site.in_features)
        assert ranks.get(site.name) == (expected if expected < even else None)
    assert str(summary(factorize(type(dense).from_pretrained(tmp_path), config))) == str(summary(model))


def test_energy_with_a_calibrated_method_bounds_the_recorded_error():
    dense, inputs = tiny_model("llama")
    model = factorize(dense, LowRankConfig(method="whitened_svd", energy=0.8, calibration=[inputs()]))
    rows = summary(model).rows
    assert rows
    assert all(row.relative_error**2 <= 0.2 + 1e-9 for row in rows)
