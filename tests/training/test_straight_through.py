"""Dense weights trained through their factors, with real Trainers: both phases, and runs that stop and go on."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from callback_worker import STEPS, examples, make
from processes import run_script
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_lowrank import (
    CheckpointError,
    ConfigError,
    DenseSparseLinear,
    FormatLinear,
    LowRankConfig,
    StraightThroughFactorizerCallback,
    TargetError,
    factorize,
    summary,
)
from hf_lowrank.testing import tiny_model
from hf_lowrank.training._straight_through import refresh, straight_through_layers


WORKER = Path(__file__).parents[1] / "callback_worker.py"
CONFIG = {"method": {"name": "dsformer", "density": 0.34, "sweeps": 2}, "param_ratio": 0.5}
# 8 steps: F(W) at 0, 2, 4 and 6, and the last two steps train the factors.
OPTIONS = {"config": CONFIG, "refresh_every": 2, "tune_fraction": 0.25}


def callback(**options):
    return StraightThroughFactorizerCallback(**(OPTIONS | options))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def logits(model, architecture="llama"):
    with torch.no_grad():
        return model.eval()(**tiny_model(architecture)[1]()).logits


class Watch(TrainerCallback):
    """The state of every layer before each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def changed(one, other):
    """Which sorts of tensors of the layers differ."""
    names = [name for name in one if "_proj." in name and not torch.equal(one[name], other[name])]
    return {name.partition("_proj.")[2] for name in names}


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_forward_is_that_of_the_factors_and_gradients_go_to_the_dense_weight(architecture, tmp_path):
    model, inputs = tiny_model(architecture)
    make(tmp_path, callback(), model=model)
    layers = straight_through_layers(model)
    assert layers
    twin = copy.deepcopy(model)
    for name, layer in straight_through_layers(twin).items():
        dense = layer.site.kind.empty(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.factorized.dense_weight().detach()
        dense.weight = torch.nn.Parameter(weight.T.contiguous() if layer.site.kind.transposed else weight)
        dense.bias = layer.bias
        twin.set_submodule(name, dense)
    for one in (model, twin):
        one.eval()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    torch.testing.assert_close(logits(model, architecture), logits(twin, architecture), rtol=1e-5, atol=1e-6)
    for name, layer in layers.items():
        assert isinstance(layer.factorized, DenseSparseLinear)
        found, expected = layer.weight.grad, twin.get_submodule(name).weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert all(parameter.grad is None for parameter in layer.factorized.parameters())


def test_first_the_weights_are_trained_then_the_factors(tmp_path):
    watch = Watch()
    trainer = make(tmp_path, callback(), watch)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    states = [start, *watch.states]
    factors, places = {"factorized.values", "factorized.dictionary.weight"}, {"factorized.mask"}
    for step in range(STEPS):
        moved = changed(states[step], states[step + 1])
        if step >= 6:
            # F(W) anew when the phase begins, and its places rest.
            assert moved - {"stf_refreshed"} - places == factors
            assert (step == 6) == ("stf_refreshed" in moved)
            assert step == 6 or not moved & places
        else:
            assert moved - {"stf_refreshed"} - places == {"weight"} | (factors if step in (2, 4) else set())
    refreshed = [int(state["model.layers.0.mlp.up_proj.stf_refreshed"]) for state in watch.states]
    assert refreshed == [0, 0, 2, 2, 4, 4, 6, 6]


def test_it_ends_as_a_factorized_model(tmp_path):
    trainer = make(tmp_path, callback())
    trainer.train()
    model = trainer.model
    assert not straight_through_layers(model)
    assert not any("stf" in name or "factorized" in name for name in model.state_dict())
    rows = summary(model).rows
    assert {row.format for row in rows} == {"dense_sparse"}
    assert sum(row.parameters for row in rows) <= 0.5 * sum(row.dense_parameters for row in rows)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.recipe["method"]["name"] == "dsformer"


def test_a_trained_model_gets_back_what_factorizing_takes(tmp_path):
    batch = {key: torch.stack([example[key] for example in examples()]) for key in ("input_ids", "labels")}
    config = {**CONFIG, "target_modules": ["up_proj", "down_proj"]}

    def loss(model):
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    options = {"per_device_train_batch_size": 16}
    dense = make(tmp_path, max_steps=60, learning_rate=1e-2, **options)
    dense.train()
    at_once = factorize(copy.deepcopy(dense.model), LowRankConfig.from_dict(config))
    through = callback(config=config, refresh_every=1, tune_fraction=0.5)
    trainer = make(tmp_path, through, model=dense.model, max_steps=20, learning_rate=1e-3, **options)
    trainer.train()
    assert loss(trainer.model) < 0.7 * loss(at_once)


@pytest.mark.parametrize("method", ["svd", {"name": "sparse_low_rank", "density": 0.02}])
def test_any_method_that_takes_weights_alone(tmp_path, method):
    config = {"method": method, "param_ratio": 0.5, "target_modules": ["up_proj"]}
    trainer = make(tmp_path, callback(config=config))
    trainer.train()
    rows = summary(trainer.model).rows
    assert len(rows) == 2
    assert {row.format for row in rows} == {"low_rank" if method == "svd" else "sparse_low_rank"}


def run(folder, processes=1, **options):
    given = {"folder": str(folder), "name": "StraightThroughFactorizerCallback", "options": OPTIONS, **options}
    return run_script(WORKER, json.dumps(given), processes=processes)


@pytest.mark.parametrize("kill", [3, 7], ids=["between refreshes", "while the factors are trained"])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path, kill):
    whole = make(tmp_path / "whole", callback(), save_strategy="steps", save_steps=1)
    whole.train()
    killed = run(tmp_path / "killed", kill=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "killed", resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(torch.load(tmp_path / "killed" / "state_0.pt"), whole.model.state_dict())


def test_two_processes_end_in_the_same_weights(tmp_path):
    done = run(tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(*(torch.load(tmp_path / "two" / f"state_{rank}.pt") for rank in (0, 1)))


def test_a_checkpoint_of_the_training_holds_a_dense_model(tmp_path):
    trainer = make(tmp_path, callback(), save_strategy="steps", save_steps=4)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert not any(isinstance(module, FormatLinear) for module in model.modules())
    assert "quantization_config" not in json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert torch.isfinite(logits(model)).all()


def test_factors_of_a_factorized_model_are_no_weights_to_train(tmp_path):
    model = tiny_model("llama")[0]
    factorize(model.model.layers[0], LowRankConfig(method="svd", rank=8))
    trainer = make(tmp_path, callback(), model=model)
    trainer.train()
    assert {row.format for row in summary(model).rows if ".layers.0." in row.name} == {"low_rank"}
    trainer.save_model(str(tmp_path / "small"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))


def test_a_restored_callback_is_the_one_the_run_began_with(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    first = make(tmp_path, callback(), **options)
    first.train()
    second = make(tmp_path, callback(refresh_every=3), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(first.model.state_dict(), second.model.state_dict())


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="no state for StraightThroughFactorizerCallback"):
        make(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"refresh_every": 0}, "`refresh_every`=0 must be an integer of at least 1"),
        ({"tune_fraction": 1.5}, r"`tune_fraction`=1.5 must be a number in \[0, 1\]"),
        ({"tune_fraction": 1}, "`tune_fraction`=1 leaves no step"),
        ({"config": {"method": "whitened_svd"}}, "method='whitened_svd' with options that need calibration data"),
        ({"config": {"method": "sltrain"}}, "method='sltrain' with options"),
        ({"config": {"method": "svd", "refine": "blocks"}}, "without `refine`"),
        ({"config": {"method": "svd", "rang": 3}}, r"LowRankConfig has no option \['rang'\]"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        callback(**options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TargetError, match="'no_proj' matches no linear layer"):
        make(tmp_path, callback(config={"method": "svd", "target_modules": ["no_proj"]}))
    with pytest.raises(ConfigError, match="`fp16`=True"):
        make(tmp_path, callback(), fp16=True)
    with pytest.raises(ConfigError, match="`refresh_every`=6 never comes in the 6 steps .* of 8"):
        make(tmp_path, callback(refresh_every=6)).train()
    with pytest.raises(ConfigError, match="only; leave it dense with `exclude_modules`"):
        make(tmp_path, callback(), model=tiny_model("mixtral")[0])
    with pytest.raises(TargetError, match="several weights in one module"):
        make(tmp_path, callback(config={"method": "svd"}), model=tiny_model("mixtral")[0])
    model, _ = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(TargetError, match="up_proj, whose weight is frozen"):
        make(tmp_path, callback(), model=model)


def test_refreshing_is_the_method_on_the_weight_as_it_stands(tmp_path):
    model, _ = tiny_model("gpt2")
    made = callback()
    make(tmp_path, made, model=model)
    for layer in straight_through_layers(model).values():
        with torch.no_grad():
            layer.weight.mul_(2).add_(0.1)
        refresh(layer, made.recipe.method)
        weight = layer.weight.detach().T if layer.site.kind.transposed else layer.weight.detach()
        expected = made.recipe.method.factorize(weight, layer.factorized.rank, {}).product()
        torch.testing.assert_close(layer.factorized.exact_weight(), expected, rtol=1e-5, atol=1e-5)
