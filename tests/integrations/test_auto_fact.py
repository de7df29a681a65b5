import copy
import logging
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConv, LowRankLinear, auto_fact
from hf_lowrank.testing.models import tiny_model


def mixed():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "table": nn.Embedding(10, 24),
            "convs": nn.Sequential(nn.Conv1d(24, 24, 3), nn.Conv2d(8, 16, 3), nn.Conv3d(4, 8, 2)),
            "linears": nn.Sequential(nn.Linear(24, 32), nn.Sequential(nn.Linear(32, 24)), nn.Linear(4, 4)),
            "memory": nn.LSTM(24, 16),
        }
    )


def factors(module):
    return {name for name, part in module.named_modules() if isinstance(part, (LowRankConv, LowRankLinear))}


@pytest.mark.parametrize("layer", [nn.Linear(24, 32), nn.Conv2d(8, 16, 3)])
def test_a_layer_at_the_root_is_replaced(layer):
    dense = copy.deepcopy(layer)
    made = auto_fact(layer, 4)
    assert isinstance(made, (LowRankLinear, LowRankConv))
    assert made.rank == 4
    tail = torch.linalg.svdvals(dense.weight.flatten(1).double())[4:].square().sum()
    torch.testing.assert_close((made.dense_weight() - dense.weight).double().square().sum(), tail, rtol=1e-4, atol=0)
    again = hf_lowrank.to_dense(made)
    assert type(again) is type(dense)


def test_every_solver_makes_the_same_layers_and_the_exact_one_the_least_error():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 40))
    errors = {}
    for solver in ("svd", "rsvd", "nmf", "snmf", "random"):
        stage = "by_design" if solver == "random" else "post"
        made = auto_fact(dense, 8, solver, deepcopy=True, stage=stage)
        assert [type(layer) for layer in dense] == [nn.Linear] * 2, "a copy was asked for"
        assert factors(made) == {"0", "1"}
        difference = made[0].dense_weight() - dense[0].weight
        errors[solver] = (difference.norm() / dense[0].weight.norm()).item()
    assert errors["svd"] <= errors["rsvd"] < errors["svd"] * 1.001
    assert errors["svd"] < errors["snmf"] < errors["nmf"] <= 1 < errors["random"]


def test_a_share_is_of_each_layers_own_largest_rank():
    made = auto_fact(mixed(), 0.5)
    for name in factors(made):
        layer = made.get_submodule(name)
        rows, columns = layer.out_features, layer.in_features
        assert layer.rank == int(rows * columns // (rows + columns) * 0.5)


def test_what_stays_dense_is_told_with_its_reason(caplog):
    caplog.set_level(logging.WARNING, "hf_lowrank")
    module = mixed()
    module["tied"] = nn.Linear(24, 10, bias=False)
    module["tied"].weight = module["table"].weight
    made = auto_fact(module, 7)
    assert factors(made) == {"convs.0", "convs.1", "linears.0", "linears.1.0"}
    (text,) = [record.getMessage() for record in caplog.records if record.name == auto_fact.__module__]
    assert "makes factors of 4 weights" in text
    assert "the rank makes no smaller: convs.2 (8 x 32), linears.2 (4 x 4)" in text
    assert "tied to others: tied (10 x 24)" in text
    assert "neither linear nor convolution: table (Embedding), memory (LSTM)" in text


def test_submodules_confine_it(caplog):
    module = mixed()
    made = auto_fact(module, 7, submodules=[module["linears"][1], module["convs"]])
    assert made is module
    assert factors(made) == {"convs.0", "convs.1", "linears.1.0"}
    module = mixed()
    copied = auto_fact(module, 6, submodules=[module["linears"]], deepcopy=True)
    assert factors(module) == set()
    assert factors(copied) == {"linears.0", "linears.1.0"}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"solver": "svd2"}, hf_lowrank.UnknownNameError, r"Unknown `solver` 'svd2'; choose one of \['nmf', 'random'"),
        ({"stage": "before"}, hf_lowrank.UnknownNameError, "Unknown `stage` 'before'"),
        ({"solver": "random"}, hf_lowrank.ConfigError, "forgets what the weights have learned"),
        ({"rank": 0}, hf_lowrank.RankError, "`rank`=0 must be an integer of at least 1, or a share"),
        ({"rank": 1.0}, hf_lowrank.RankError, "`rank`=1.0 must be"),
        ({"rank": True}, hf_lowrank.RankError, "`rank`=True must be"),
        ({"num_iter": 0}, hf_lowrank.ConfigError, "`num_iter`=0"),
        ({"fact_led_unit": True}, hf_lowrank.ConfigError, "factors of factors"),
        ({"submodules": [nn.Linear(2, 2)]}, hf_lowrank.ConfigError, "modules inside `module`"),
        ({"submodules": []}, hf_lowrank.ConfigError, r"`submodules`=\[\] must be a non-empty list of modules"),
        ({"submodules": 3}, hf_lowrank.ConfigError, "`submodules`=3 must be a non-empty list of modules"),
        ({"submodules": "linears"}, hf_lowrank.ConfigError, "`submodules`='linears' must be a non-empty list"),
    ],
)
def test_arguments_that_are_refused(options, error, message):
    module = mixed()
    with pytest.raises(error, match=message):
        auto_fact(module, **{"rank": 4, **options})
    assert not factors(module)


def test_a_weight_that_is_not_finite_is_left_out_with_an_argument_there_is():
    module = mixed()
    module["linears"][0].weight.data[0, 0] = torch.nan
    with pytest.raises(hf_lowrank.NonFiniteError, match="linears.0 .* or confine auto_fact with `submodules`") as e:
        auto_fact(module, 4)
    assert "exclude_modules" not in str(e.value)
    assert factors(auto_fact(module, 4, submodules=[module["convs"]])) == {"convs.0", "convs.1", "convs.2"}


def test_without_scikit_learn_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(hf_lowrank.MissingPackageError, match="needs scikit-learn"):
        auto_fact(mixed(), 4, "nmf")


def test_a_factorized_module_is_refused():
    made = auto_fact(mixed(), 4)
    with pytest.raises(hf_lowrank.ConfigError, match="factorized already"):
        auto_fact(made, 4)


def test_by_design_is_a_new_start_and_comes_back_from_disk(tmp_path):
    model, inputs = tiny_model("llama")
    dense = {name: p.clone() for name, p in model.named_parameters()}
    auto_fact(model, 0.5, stage="by_design")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LowRankLinear)
    weight = layer.dense_weight()
    assert (weight - dense["model.layers.0.mlp.up_proj.weight"]).norm() > weight.norm() / 2
    # As a new linear: variance 1 / (3 in).
    assert 0.7 < float(weight.var() * 3 * weight.shape[1]) < 1.4
    logits = model(**inputs()).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs()).logits, logits)
    twin, _ = tiny_model("llama")
    auto_fact(twin, 0.5, stage="by_design")
    assert torch.equal(twin(**inputs()).logits, logits), "the same seed, the same start"


def test_inputs_need_not_be_contiguous():
    made = auto_fact(nn.Sequential(nn.Linear(24, 32)), 4)
    x = torch.randn(24, 5, 3).permute(1, 2, 0)
    torch.testing.assert_close(made(x), made(x.contiguous()))
