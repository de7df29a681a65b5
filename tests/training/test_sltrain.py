"""Pre-training from scratch with a plain Trainer: where it begins, that it learns, and runs that stop and go on."""

import copy
import signal
import warnings
from pathlib import Path

import pytest
import torch
from callback_worker import examples, make
from pretraining_worker import build
from processes import run_script
from transformers import AutoModelForCausalLM

from hf_lowrank import METHODS, ConfigError, FormatLinear, LowRankConfig, factorize, summary
from hf_lowrank.linalg import largest_entries, truncated_svd
from hf_lowrank.testing import tiny_model


WORKER = Path(__file__).parents[1] / "pretraining_worker.py"


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FormatLinear)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_model("llama")[1]()).logits


def run(folder, kill=-1, resume="no", processes=1):
    return run_script(WORKER, folder, kill, resume, processes=processes)


def test_where_training_begins():
    model = build(alpha=8.0)
    assert len(layers(model)) == 14, "attention and MLP; embeddings and the head stay dense"
    for layer in layers(model).values():
        bound = layer.in_features**-0.5
        assert not layer.left.any()
        for drawn in (layer.right, layer.values):
            assert 0.8 * bound < drawn.abs().max() <= bound
            assert abs(float(drawn.detach().mean())) < 0.3 * bound
        assert layer.nonzeros == round(0.05 * layer.out_features * layer.in_features)
        assert len(layer.indices.unique()) == layer.nonzeros
        assert layer.scaling == 2.0
        assert layer.relative_error is None
        entries = torch.zeros(layer.out_features * layer.in_features)
        entries = entries.scatter(0, layer.indices.long(), layer.values.detach()).view_as(layer.dense_weight())
        assert torch.equal(layer.dense_weight(), entries), "W = S"
    first, second = (layers(model)[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert not torch.equal(first.indices, second.indices), "every layer has its own"
    assert all(row.relative_error is None for row in summary(model).rows)


def test_a_layer_draws_the_same_whichever_others_there_are():
    _, model = build(), tiny_model("llama")[0]
    config = LowRankConfig(method={"name": "sltrain", "density": 0.05}, rank=4, target_modules=["down_proj"], seed=0)
    alone = layers(factorize(model, config))
    every = layers(build())
    assert alone.keys() == {name for name in every if "down_proj" in name}
    assert all(torch.equal(layer.indices, every[name].indices) for name, layer in alone.items())
    assert all(torch.equal(layer.right, every[name].right) for name, layer in alone.items())
    other = layers(build(seed=1))
    assert not any(torch.equal(layer.indices, other[name].indices) for name, layer in every.items())


def test_it_learns_with_a_plain_trainer_and_reloads(tmp_path):
    model = build()
    places = {name: layer.indices.clone() for name, layer in layers(model).items()}
    start = copy.deepcopy(model.state_dict())
    batch = {key: torch.stack([example[key] for example in examples()]) for key in ("input_ids", "labels")}

    def loss():
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    make(tmp_path, model=model, max_steps=60, per_device_train_batch_size=16, learning_rate=1e-2).train()
    assert loss() < 0.8 * before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    for name, layer in layers(model).items():
        assert torch.equal(layer.indices, places[name])
        assert {f"{name}.{part}" for part in ("left", "right", "values")} <= changed
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert all(layer.scaling == 8.0 for layer in layers(again).values())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(layer.indices, places[name]) for name, layer in layers(half).items())
    assert half(**tiny_model("llama")[1]()).logits.dtype == torch.bfloat16


def test_the_config_of_a_checkpoint_builds_a_new_start(tmp_path):
    build().save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(saved)
    assert not layers(model), "a plain dense model"
    assert_same(factorize(model, saved.quantization_config).state_dict(), build().state_dict())


def test_without_entries_it_is_low_rank_from_scratch(tmp_path):
    model = build(density=0)
    assert {name.rpartition(".")[2] for name in model.state_dict() if "mlp" in name} == {"left", "right"}
    for layer in layers(model).values():
        # The variance of a new linear layer, whatever the scale.
        assert float(layer.exact_weight().std()) == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.3)
    start = copy.deepcopy(model.state_dict())
    make(tmp_path, model=model).train()
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])]
    assert still == []
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_support_of_the_largest_entries_of_what_low_rank_leaves():
    dense = tiny_model("llama")[0]
    weight = dense.model.layers[0].mlp.up_proj.weight.detach().double()
    method = {"name": "sltrain", "density": 0.05, "support": "magnitude"}
    layer = layers(factorize(dense, LowRankConfig(method=method, rank=4)))["model.layers.0.mlp.up_proj"]
    left, right, _ = truncated_svd(weight, 4)
    expected = largest_entries(weight - left @ right, layer.nonzeros)
    assert torch.equal(layer.indices.long(), expected)
    assert not layer.left.any(), "the rest begins as with any support"


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", kill=5)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path / "killed", resume="resume")
    assert resumed.returncode == 0, resumed.stderr
    states = [torch.load(tmp_path / name / "state_0.pt") for name in ("whole", "killed")]
    assert_same(*states)
    drawn = build(seed=9).state_dict()
    name = "model.layers.0.mlp.up_proj.indices"
    assert not torch.equal(states[1][name], drawn[name]), "the support is that of the file"


def test_two_processes_end_in_the_same_weights(tmp_path):
    done = run(tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [torch.load(tmp_path / "two" / f"state_{rank}.pt") for rank in (0, 1)]
    assert_same(*states)
    # Batches of both together are those of one process with twice the micro-batches.
    alone = build()
    make(tmp_path / "one", model=alone, per_device_train_batch_size=8, learning_rate=1e-2).train()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(tensor, states[0][name], rtol=1e-3, atol=1e-4)


def test_half_precision_without_masters_is_warned_of():
    model = tiny_model("llama")[0].to(torch.bfloat16)
    with pytest.warns(UserWarning, match="optimizer without float32 masters loses small steps.*`bf16=True`"):
        factorize(model, LowRankConfig(method="sltrain", rank=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorize(tiny_model("llama")[0], LowRankConfig(method="sltrain", rank=4))


def test_bf16_of_trainer_keeps_float32_masters(tmp_path):
    model = build()
    make(tmp_path, model=model, bf16=True).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": {"name": "sltrain", "density": -0.1}}, r"`density`=-0.1 of sltrain must be a number in \[0, 1\]"),
        ({"method": {"name": "sltrain", "alpha": 0}}, r"`alpha`=0 of sltrain must be a number in \(0, 1e"),
        ({"method": {"name": "sltrain", "support": "all"}}, "`support`='all' of sltrain must be one of"),
        ({"method": "sltrain", "energy": 0.9}, "`energy`=0.9 compares with the dense weights"),
        ({"method": "sltrain", "allocation": "knapsack"}, "`allocation`='knapsack' compares with the dense weights"),
        ({"method": "sltrain", "refine": "blocks"}, "`refine`='blocks' compares with the dense weights"),
        ({"method": "sltrain", "format": "pivoted"}, "`format`='pivoted' cannot hold"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        LowRankConfig(**options)


def test_trained_weights_are_not_thrown_away_while_loading(tmp_path):
    tiny_model("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="would be lost.*`from_config`.*such as 'sparse_low_rank'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=LowRankConfig(method="sltrain"))
    assert METHODS["sltrain"].initialises
