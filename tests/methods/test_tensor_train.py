"""Bonds from ranks, modes from sizes, errors from bonds; and from a model to a checkpoint and back."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank import METHODS, ConfigError, LowRankConfig, TensorTrainLinear, factorize, summary
from hf_lowrank.linalg import full_bonds, tensor_train
from hf_lowrank.testing import make_weight, tiny_model


TensorTrain = METHODS["tensor_train"]
PAPER = {"out_shape": [3, 4, 4, 4, 4], "in_shape": [4, 4, 8, 6, 4]}


def test_the_rank_bounds_the_bonds_of_the_shapes_of_the_paper():
    method = TensorTrain(**PAPER)
    assert method.layout(768, 3072, 768)["bonds"] == [12, 192, 384, 16]
    assert method.layout(768, 3072, 100)["bonds"] == [12, 100, 100, 16]
    assert method.layout(768, 3072, 5)["bonds"] == [5, 5, 5, 5]
    # Only truncation compresses.
    size = 768 * 3072
    assert TensorTrainLinear.cost(768, 3072, 768, **method.layout(768, 3072, 768)) > size
    ranks = range(1, 769, 8)
    costs = [TensorTrainLinear.cost(768, 3072, rank, **method.layout(768, 3072, rank)) for rank in ranks]
    assert costs == sorted(costs)


def test_caps_on_bonds():
    assert TensorTrain(max_bond=20, **PAPER).layout(768, 3072, 768)["bonds"] == [12, 20, 20, 16]
    # The numbers of the paper's example: what a neighbour cannot fill is not stored.
    assert TensorTrain(bond_dims=[45, 82, 384, 16], **PAPER).layout(768, 3072, 768)["bonds"] == [12, 82, 384, 16]
    assert TensorTrain(bond_dims=[12, 192, 384, 1], **PAPER).layout(768, 3072, 768)["bonds"] == [12, 192, 24, 1]
    assert TensorTrain(bond_dims=[12, 192, 384, 16], **PAPER).layout(768, 3072, 10)["bonds"] == [10] * 4


def test_shapes_by_size_and_automatic_ones():
    method = TensorTrain(out_shape={768: [3, 4, 4, 4, 4]}, in_shape={"768": [4, 4, 4, 4, 3]})
    layout = method.layout(768, 768, 768)
    assert layout == {"out_shape": [3, 4, 4, 4, 4], "in_shape": [4, 4, 4, 4, 3], "bonds": [12, 192, 192, 12]}
    assert METHODS.build(METHODS.describe(method)) == method
    other = method.layout(576, 577, 8)
    assert math.prod(other["out_shape"]) == 576
    assert 577 < math.prod(other["in_shape"]) < 600
    assert other["bonds"] == [min(8, bond) for bond in full_bonds(other["out_shape"], other["in_shape"])]
    assert len(TensorTrain(cores=3).layout(64, 96, 8)["out_shape"]) == 3
    given = TensorTrain(out_shape=[8, 8]).layout(64, 96, 8)
    assert given["in_shape"] == [8, 12]


def test_the_error_is_that_of_the_decompositions():
    weight = make_weight(24, 40, decay=0.97)
    method = TensorTrain(cores=3)
    for rank in (1, 5, 9):
        layout = method.layout(24, 40, rank)
        cores, energies = tensor_train(weight, **layout)
        found = method.factorize(weight, rank, {})
        torch.testing.assert_close((weight - found.product()).square().sum(), energies.sum(), rtol=1e-9, atol=1e-24)
        # In another gauge, the same weight.
        layer = TensorTrainLinear.from_factors(found, dtype=torch.float64)
        torch.testing.assert_close(layer.exact_weight(), found.product(), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.cores[layer.central].norm(), weight.sub(weight - found.product()).norm())


def test_a_padded_weight_keeps_its_error_when_it_is_stored():
    weight = make_weight(23, 37, decay=0.97)
    method = TensorTrain(cores=4)
    layout = method.layout(23, 37, 6)
    assert math.prod(layout["out_shape"]) * math.prod(layout["in_shape"]) > 23 * 37
    found = method.factorize(weight, 6, {})
    layer = TensorTrainLinear.from_factors(found, dtype=torch.float64)
    torch.testing.assert_close(layer.exact_weight(), found.product(), rtol=0, atol=1e-12)
    full = TensorTrainLinear.from_factors(method.factorize(weight, 23, {}), dtype=torch.float64)
    torch.testing.assert_close(full.exact_weight(), weight, rtol=0, atol=1e-12)


def test_many_cores_find_a_kronecker_structure_that_low_rank_does_not():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    weight = torch.kron(torch.kron(*parts[:2]), parts[2])
    found = TensorTrain(cores=3).factorize(weight, 1, {})
    assert found.relative_error < 1e-12
    assert TensorTrainLinear.cost(64, 64, 1, **found.layout) == 48
    assert METHODS["svd"]().factorize(weight, 16, {}).relative_error > 0.1


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("budget", [{"param_ratio": 0.5}, {"target_bytes": 230_000}])
@pytest.mark.parametrize("allocation", ["uniform", "knapsack"])
def test_a_budget_is_met_and_what_is_stored_is_what_was_counted(tmp_path, budget, allocation):
    dense, _ = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    config = LowRankConfig(
        method={"name": "tensor_train", "cores": 3}, allocation=allocation, rank_multiple=1, **budget
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", lowrank_config=config)
    rows = summary(model).rows
    assert {row.format for row in rows} == {"tensor_train"}
    model.save_pretrained(tmp_path / "small")
    stored = load_file(tmp_path / "small/model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == summary(model).bytes
    if "param_ratio" in budget:
        kept, all_of = sum(row.parameters for row in rows), sum(row.dense_parameters for row in rows)
        assert 0.35 * all_of < kept <= 0.5 * all_of
    else:
        assert 0.9 * budget["target_bytes"] < (tmp_path / "small/model.safetensors").stat().st_size
        assert (tmp_path / "small/model.safetensors").stat().st_size <= budget["target_bytes"]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(model))
    in_memory = factorize(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), config)
    assert torch.equal(logits(in_memory), logits(model))


def test_full_bonds_give_back_the_model():
    dense, _ = tiny_model("gpt2")
    expected = logits(dense)
    factorize(
        dense,
        LowRankConfig(method="tensor_train", rank_pattern={"c_attn|c_fc": 64}, target_modules=["c_attn", "c_fc"]),
    )
    assert {row.format for row in summary(dense).rows} == {"tensor_train"}
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cores": 1}, "`cores`=1 of tensor_train must be an integer of at least 2"),
        ({"cores": 9}, "`cores`=9 of tensor_train must be at most 8"),
        ({"out_shape": [3, 0]}, r"`out_shape`=\[3, 0\] of tensor_train must hold lists of integers"),
        ({"in_shape": {768: "x"}}, "`in_shape`='x' of tensor_train must hold lists"),
        ({"bond_dims": 3}, "`bond_dims`=3"),
        ({"max_bond": 0}, "`max_bond`=0"),
        ({"max_bond": 3, "bond_dims": [3]}, "Give `bond_dims` or `max_bond` of tensor_train, not both"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        TensorTrain(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"out_shape": [4, 4]}, r"`out_shape`=\[4, 4\] of a train for a 24 x 40 weight .* Change the options"),
        ({"out_shape": [4, 6], "in_shape": [2, 4, 5]}, "must have one length"),
        ({"bond_dims": [3, 3]}, r"`bond_dims`=\[3, 3\] must have 4 entries for 5 cores"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        TensorTrain(**options).layout(24, 40, 3)
