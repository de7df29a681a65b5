"""One level is the SVD, Kronecker structure is found, and a budget counts every level."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import METHODS, ConfigError, LowRankConfig, MultiResolutionLinear, factorize, summary, truncate
from hf_lowrank.testing import check_method, make_weight, tiny_model


MultiResolution = METHODS["multi_resolution"]
MATRIX = [["o1", "o2"], ["i1", "i2"]]
KRONECKER = [["o1", "i1"], ["o2", "i2"]]
VECTORS = [["o1"], ["o2"], ["i1"], ["i2"]]


def error(weight, method, rank):
    found = method.factorize(weight, rank, {})
    measured = float((weight - found.product()).norm() / weight.norm())
    assert found.relative_error == pytest.approx(measured, rel=1e-9, abs=1e-12)
    return measured


def logits(model):
    with torch.no_grad():
        return model(**tiny_model("llama")[1]()).logits


def test_one_level_is_the_svd():
    weight = make_weight(24, 40)
    one = MultiResolution(partitions=[MATRIX], shares=[1])
    for rank in (1, 7, 24):
        found, svd = one.factorize(weight, rank, {}), METHODS["svd"]().factorize(weight, rank, {})
        assert found.layout == {}
        assert found.rest is None
        torch.testing.assert_close(found.product(), svd.product(), rtol=0, atol=1e-12)
        assert found.relative_error == pytest.approx(svd.relative_error, rel=1e-9, abs=1e-12)


def test_a_kronecker_product_needs_one_term():
    # 24 = 4 * 6 and 40 = 8 * 5: the halves that the method takes.
    weight = torch.kron(torch.randn(4, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64))
    options = {"partitions": [MATRIX, KRONECKER], "ranks": [1]}
    assert error(weight, MultiResolution(order="fine_to_coarse", **options), 1) < 1e-10
    assert error(weight, METHODS["svd"](), 2) > 0.5
    # Coarse first spends the SVD on it; fitting again finds it.
    greedy = error(weight, MultiResolution(**options), 1)
    assert error(weight, MultiResolution(joint_als_sweeps=60, **options), 1) < 0.1 * greedy


def test_levels_lower_the_error_and_joint_sweeps_lower_it_further():
    weight = make_weight(24, 40, decay=0.97)
    found = [error(weight, METHODS["svd"](), 6)]
    for levels in (2, 3):
        options = {"partitions": [MATRIX, KRONECKER, VECTORS][:levels], "ranks": [3, 4][: levels - 1]}
        found.append(error(weight, MultiResolution(**options), 6))
    found += [error(weight, MultiResolution(ranks=[3, 4], joint_als_sweeps=sweeps), 6) for sweeps in (1, 2, 4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.98 * found[2]


@pytest.mark.parametrize("shares", [(0.9, 0.05, 0.05), (0.5, 0.5, 0), (1, 0, 1)])
def test_numbers_are_divided_by_shares(shares):
    method, shape = MultiResolution(shares=shares), (96, 64)
    for rank in (1, 5, 20):
        layout = method.layout(*shape, rank)
        factors = rank * sum(shape)
        levels = {len(level["partition"]): level for level in layout.get("levels", [])}
        for blocks, share in zip((2, 4), shares[1:], strict=True):
            allowed = share / shares[0] * factors
            each = {2: 8 * 8 + 12 * 8, 4: 8 + 12 + 8 + 8}[blocks]
            terms = levels[blocks]["terms"] if blocks in levels else 0
            assert terms * each <= allowed + 1e-9 < (terms + 1) * each
        assert MultiResolutionLinear.cost(*shape, rank, **layout) <= factors / shares[0] * sum(shares) + 1e-9


def test_sides_that_cannot_be_divided():
    weight = make_weight(23, 29)
    assert error(weight, MultiResolution(ranks=[5, 2]), 4) <= error(weight, METHODS["svd"](), 4)
    # Blocks of 1 x 29 and 23 x 1: a second SVD, and of one 1 x 1 the other is the weight.
    assert MultiResolution(ranks=[40, 0]).layout(23, 29, 4)["levels"][0]["terms"] == 23


def test_the_laws_hold_with_other_options():
    check_method(MultiResolution(ranks=(2, 3), joint_als_sweeps=1, als_sweeps=2))
    check_method(MultiResolution(order="fine_to_coarse", ranks=(2, 2), als_sweeps=2))


def test_a_budget_counts_all_levels_and_a_checkpoint_brings_them_back(tmp_path):
    model, _ = tiny_model("llama")
    method = {"name": "multi_resolution", "shares": [0.6, 0.2, 0.2], "als_sweeps": 5}
    factorize(model, LowRankConfig(method=method, param_ratio=0.5, rank_multiple=1))
    rows = summary(model).rows
    assert 0.46 < sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows) <= 0.5
    assert len(model.model.layers[0].mlp.up_proj.levels) == 2
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(logits(again), logits(model))
    size = (tmp_path / "model.safetensors").stat().st_size
    other, _ = tiny_model("llama")
    factorize(other, LowRankConfig(method=method, target_bytes=size, rank_multiple=1)).save_pretrained(tmp_path / "b")
    # Room in the header is kept for as many tensors as a layer may have, which shows in a tiny model.
    assert 0.95 * size < (tmp_path / "b" / "model.safetensors").stat().st_size <= size
    streamed = tiny_model("llama")[0]
    streamed.save_pretrained(tmp_path / "dense")
    config = LowRankConfig(method=method, param_ratio=0.5, rank_multiple=1)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", lowrank_config=config)
    torch.testing.assert_close(logits(streamed), logits(model))


def test_ranks_by_error_and_lower_ranks_that_keep_the_levels():
    model, _ = tiny_model("llama")
    method = {"name": "multi_resolution", "als_sweeps": 1}
    factorize(model, LowRankConfig(method=method, energy=0.7, target_modules=["layers.0.mlp.up_proj"]))
    layer = model.model.layers[0].mlp.up_proj
    levels, before = copy.deepcopy(layer.levels), layer.exact_weight()
    assert levels
    lost = truncate(model, rank=4)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.rank, layer.levels) == (4, levels)
    found = float((layer.exact_weight() - before).norm() / before.norm())
    assert found == pytest.approx(lost["model.layers.0.mlp.up_proj"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partitions": [KRONECKER]}, r"`partitions`=.* must begin with \[\['o1', 'o2'\], \['i1', 'i2'\]\] and"),
        ({"partitions": [MATRIX, [["o1"], ["o2"]]]}, "in two blocks or more"),
        ({"partitions": "svd"}, "`partitions`='svd'"),
        ({"shares": [1, 0]}, "must be 3 numbers of at least 0"),
        ({"shares": [0, 1, 0]}, "the first above 0"),
        ({"shares": [1, -1, 0]}, "`shares`="),
        ({"ranks": [1]}, "`ranks`=.* must be 2 integers"),
        ({"ranks": [1, True]}, "`ranks`="),
        ({"order": "random"}, r"`order`='random' .* one of \['coarse_to_fine', 'fine_to_coarse'\]"),
        ({"joint_als_sweeps": -1}, "`joint_als_sweeps`=-1 of multi_resolution must be an integer of at least 0"),
        ({"als_sweeps": 0}, "`als_sweeps`=0"),
        ({"als_tolerance": -1}, "`als_tolerance`=-1"),
        ({"seed": 0.5}, "`seed`=0.5"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        MultiResolution(**options)


def test_options_survive_json():
    method = MultiResolution(partitions=[MATRIX, VECTORS], shares=[0.5, 0.5], order="fine_to_coarse")
    assert METHODS.build(METHODS.describe(method)) == method
