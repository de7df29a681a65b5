"""What is reported as reached is what the model has."""

import pytest

from hf_lowrank import Latencies, LowRankConfig, factorize, report
from hf_lowrank.latency import Times
from hf_lowrank.testing import tiny_model


def budget_of(**options):
    model, inputs = tiny_model("llama")
    factorize(model, LowRankConfig(**{"method": "svd", "rank_multiple": 1, **options}), calibration=[inputs()])
    return model, report(model, spectra=False)


def test_ratio():
    _, found = budget_of(param_ratio=0.5)
    assert (found.budget.name, found.budget.asked, found.budget.counted, found.budget.pinned) == (
        "param_ratio",
        0.5,
        14,
        0,
    )
    kept, dense = (sum(getattr(row, key) for row in found.layers) for key in ("parameters", "dense_parameters"))
    assert found.budget.reached == kept / dense
    assert 0.48 < found.budget.reached <= 0.5


def test_layers_set_apart_do_not_count():
    _, found = budget_of(param_ratio=0.5, rank_pattern={"layers.0.mlp.up_proj": "dense", "q_proj": 2})
    assert (found.budget.counted, found.budget.pinned) == (11, 3)
    assert 0.48 < found.budget.reached <= 0.5
    assert next(layer for layer in found.layers if layer.name == "model.layers.0.mlp.up_proj").format == "dense"


def test_nor_do_those_that_share_a_basis_with_them():
    method = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q_proj", "k_proj"]]}
    _, found = budget_of(method=method, param_ratio=0.5, rank_pattern={"layers.0.self_attn.k_proj": 3})
    assert (found.budget.counted, found.budget.pinned) == (12, 2)


def test_parameters():
    _, found = budget_of(target_params=20000)
    assert found.budget.reached == sum(layer.parameters for layer in found.layers)
    assert 0.9 * 20000 < found.budget.reached <= 20000


def test_bytes_are_those_of_the_file(tmp_path):
    model, found = budget_of(target_bytes=150_000)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert found.budget.reached <= size <= 150_000
    assert size - found.budget.reached < 200 * len(model.state_dict())


def test_rank_is_the_largest():
    _, found = budget_of(rank=7)
    assert (found.budget.asked, found.budget.reached) == (7, 7)


def test_energy_is_the_least_that_a_layer_keeps():
    _, found = budget_of(energy=0.7)
    assert found.budget.reached == min(1 - layer.relative_error**2 for layer in found.layers if layer.rank is not None)
    assert 0.7 <= found.budget.reached < 0.8


def test_time_is_not_told(tmp_path):
    times = {
        shape: Times(100, {rank: rank for rank in range(1, 33)}) for shape in ((64, 64), (32, 64), (96, 64), (64, 96))
    }
    Latencies(times).save(tmp_path / "table.json")
    allocation = {"name": "knapsack", "cost": "latency", "latencies": str(tmp_path / "table.json")}
    _, found = budget_of(param_ratio=0.9, allocation=allocation)
    assert (found.budget.asked, found.budget.reached) == (0.9, None)


def test_a_model_without_a_recipe():
    found = report(tiny_model("llama")[0])
    assert (found.budget.name, found.budget.asked, found.budget.reached) == (None, None, None)


@pytest.mark.parametrize("exclude", [None, ["k_proj"]])
def test_targets_that_stayed_dense_count_and_what_was_left_out_does_not(exclude):
    _, found = budget_of(param_ratio=0.9, exclude_modules=exclude)
    names = {layer.projection for layer in found.layers}
    assert ("k_proj" in names) == (exclude is None)
    assert "lm_head" not in names
    assert not any(part in layer.name for layer in found.layers for part in (".left", ".right"))
