"""Latency as a cost. No test depends on a clock: tables are given, and what is measured is only looked at for form."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import FORMATS, METHODS, ConfigError, Latencies, LowRankConfig, factorize, measure_latencies, summary
from hf_lowrank.allocation import foot_of_step
from hf_lowrank.allocation.knapsack import Knapsack
from hf_lowrank.allocation.uniform import Uniform
from hf_lowrank.latency import Times
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


@pytest.fixture
def llama(tmp_path):
    dense, _ = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    return dense, tmp_path / "dense"


def table_for(model, times, path):
    """A saved table with `times(rows, columns)` for every shape of `model`."""
    shapes = {(site.out_features, site.in_features) for site in match_sites(model)}
    Latencies({shape: times(*shape) for shape in shapes}).save(path)
    return str(path)


def linear(rows, columns):
    """Time in proportion to the parameters, after an overhead of a fixed 1000 for the second kernel."""
    return Times(rows * columns, {r: 1000 + r * (rows + columns) for r in range(8, 41, 8)})


def spent(model, table):
    """Nanoseconds of all targets, and what they took dense."""
    table, dense = Latencies.load(table), tiny_model("llama")[0]
    ranks = {row.name: row.rank for row in summary(model).rows}
    shapes = {site.name: (site.out_features, site.in_features) for site in match_sites(dense)}
    times = {name: table.of(*shape) for name, shape in shapes.items()}
    total = sum(times[n].ranks[ranks[n]] if n in ranks else times[n].dense for n in shapes)
    return total, sum(time.dense for time in times.values())


@pytest.mark.parametrize("ratio", [0.75, 0.9])
def test_the_budget_is_a_fraction_of_the_dense_time(llama, tmp_path, ratio):
    dense, folder = llama
    table = table_for(dense, linear, tmp_path / "table.json")
    config = LowRankConfig(method="svd", allocation=Knapsack(cost="latency", latencies=table), param_ratio=ratio)
    streamed = AutoModelForCausalLM.from_pretrained(folder, lowrank_config=config)
    memory = factorize(AutoModelForCausalLM.from_pretrained(folder), config)
    assert str(summary(streamed)) == str(summary(memory))
    taken, total = spent(streamed, table)
    assert (ratio - 0.05) * total <= taken <= ratio * total


def test_what_is_not_faster_stays_dense(llama, tmp_path):
    """Where k_proj and v_proj gain nothing at any rank, and up_proj from rank 24 on."""
    dense, folder = llama

    def times(rows, columns):
        if rows == 32:
            return Times(100, {8: 101, 16: 102})
        return Times(100, {8: 10, 16: 20, 24: 100, 32: 90}) if rows == 96 else Times(100, {8: 10, 16: 20, 24: 30})

    table = table_for(dense, times, tmp_path / "table.json")
    for ratio in (0.6, 0.8):
        config = LowRankConfig(method="svd", allocation=Knapsack(cost="latency", latencies=table), param_ratio=ratio)
        ranks = {row.name: row.rank for row in summary(factorize(tiny_model("llama")[0], config)).rows}
        assert ranks
        assert not any(name.endswith(("k_proj", "v_proj")) for name in ranks)
        assert all(rank <= 16 for name, rank in ranks.items() if name.endswith(("up_proj", "gate_proj")))


def test_times_never_fall_with_the_rank():
    times = Times(100, {8: 30, 16: 20, 24: 50})
    assert [times.at(rank) for rank in (1, 8, 9, 16, 17, 24, 99)] == [30, 30, 30, 30, 50, 50, 50]


def test_a_measured_table_has_every_shape_once_and_every_allowed_rank(tmp_path):
    table = measure_latencies([(64, 64), (96, 64), (64, 64), (4, 4)])
    assert sorted(table.shapes) == [(4, 4), (64, 64), (96, 64)]
    assert list(table.shapes[64, 64].ranks) == [8, 16, 24]
    assert list(table.shapes[96, 64].ranks) == [8, 16, 24, 32]
    assert all(t > 0 for times in table.shapes.values() for t in (times.dense, *times.ranks.values()))
    assert table.setup == {"device": "cpu", "dtype": "torch.float32", "format": "low_rank", "rows": 1}
    table.save(tmp_path / "table.json")
    again = Latencies.load(tmp_path / "table.json")
    assert (again.shapes, again.setup) == (table.shapes, table.setup)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_measured_on_the_way(name, tmp_path):
    model, _ = tiny_model(name)
    model.save_pretrained(tmp_path)
    config = LowRankConfig(method="svd", allocation={"name": "knapsack", "cost": "latency"}, param_ratio=0.9)
    AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config, dtype=torch.bfloat16)
    factorize(model, config)


@pytest.mark.parametrize("method", ["dsformer", "sparse_low_rank", "svd"])
def test_layers_are_timed_as_their_method_lays_them_out(method, monkeypatch):
    made = METHODS[method]()
    # The stored numbers in the place of nanoseconds.
    monkeypatch.setattr(
        "hf_lowrank.latency._median", lambda layer, inputs: sum(t.numel() for t in layer.state_dict().values())
    )
    times = measure_latencies([(48, 32)], format=made.format, layout=made.layout).of(48, 32)
    format = FORMATS[made.format]
    assert times.dense == 48 * 32
    assert times.ranks == {rank: format.cost(48, 32, rank, **made.layout(48, 32, rank)) for rank in times.ranks}
    assert max(times.ranks) + 8 >= format.break_even(48, 32, made.layout) > max(times.ranks)


def tiles(rows, columns):
    """Kernels that work in tiles of 16 ranks, and for the narrow ones no faster than dense."""
    return Times(100 if rows > 32 else 5, {rank: 10 + 10 * (-(-rank // 16)) + rank // 8 for rank in range(8, 41, 8)})


def test_uniform_ranks_go_down_to_the_foot_of_the_highest_step(llama, tmp_path):
    dense, folder = llama
    table = table_for(dense, tiles, tmp_path / "table.json")
    plain = LowRankConfig(method="svd", allocation="uniform", param_ratio=0.8)
    rounded = LowRankConfig(
        method="svd", allocation={"name": "uniform", "rounding": "latency", "latencies": table}, param_ratio=0.8
    )
    before = {row.name: row.rank for row in summary(factorize(tiny_model("llama")[0], plain)).rows}
    model = factorize(tiny_model("llama")[0], rounded)
    after = {row.name: row.rank for row in summary(model).rows}
    assert set(before.values()) == {16, 24}
    # A rank of 24 takes two tiles, one of 16 fills the first; where k_proj and v_proj are, dense is faster.
    assert after == {name: 16 for name in before if not name.endswith(("k_proj", "v_proj"))}
    streamed = AutoModelForCausalLM.from_pretrained(folder, lowrank_config=rounded)
    assert str(summary(streamed)) == str(summary(model))


def test_the_foot_of_a_step():
    assert foot_of_step([8, 16, 24, 32], [10, 11, 30, 31]) == 16
    assert foot_of_step([8, 16, 24, 32], [10, 30, 31, 51]) == 24, "of two steps alike, the upper one"
    assert foot_of_step([8, 16], [10, 10]) == 8


def test_refusals(llama, tmp_path):
    dense, folder = llama
    with pytest.raises(ConfigError, match="`cost`='bytes' of knapsack"):
        Knapsack(cost="bytes")
    with pytest.raises(ConfigError, match="`rows`=0 of knapsack"):
        Knapsack(rows=0)
    for options, match in (({"rounding": "up"}, "`rounding`='up' of uniform"), ({"span": 0}, r"`span`=0 of uniform")):
        with pytest.raises(ConfigError, match=match):
            Uniform(**options)
    with pytest.raises(ConfigError, match="`target_bytes` spends what .*rounding='latency' leaves"):
        LowRankConfig(allocation=Uniform(rounding="latency"), target_bytes=1000)
    for budget in ("target_params", "target_bytes"):
        with pytest.raises(ConfigError, match=f"`{budget}` counts what is stored"):
            LowRankConfig(allocation=Knapsack(cost="latency"), **{budget: 1000})
    missing = LowRankConfig(method="svd", allocation=Knapsack(cost="latency", latencies=str(tmp_path / "no.json")))
    with pytest.raises(ConfigError, match="no.json' is no table of latencies"):
        AutoModelForCausalLM.from_pretrained(folder, lowrank_config=missing)
    Latencies({(64, 64): Times(9, {8: 3})}).save(tmp_path / "table.json")
    other = LowRankConfig(method="svd", allocation=Knapsack(cost="latency", latencies=str(tmp_path / "table.json")))
    with pytest.raises(ConfigError, match="has no shape 32 x 64"):
        factorize(dense, other)
    table = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**table, "version": 2}))
    with pytest.raises(ConfigError, match="has version 2, not 1"):
        Latencies.load(tmp_path / "table.json")
