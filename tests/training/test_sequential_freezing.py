"""Sequential freezing with a real Trainer: what rests keeps its bits and its state, and costs no gradient."""

import copy
from types import SimpleNamespace

import pytest
import torch
from rank_training_worker import make
from transformers import TrainerCallback, TrainerState

from hf_lowrank import ConfigError, TargetError
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import SequentialFreezingCallback
from hf_lowrank.training._components import component_layers


class Watch(TrainerCallback):
    """Notes the factors before each step, their gradients, and their state in the optimizer after it."""

    def __init__(self):
        self.before, self.gradients, self.states = [], [], []

    def factors(self, model):
        return {
            (name, side): getattr(layer, side).weight
            for name, layer in component_layers(model).items()
            for side in ("left", "right")
        }

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({key: weight.detach().clone() for key, weight in self.factors(model).items()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({key: weight.grad is not None for key, weight in self.factors(model).items()})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = optimizer.optimizer.state
        self.states.append({key: copy.deepcopy(states.get(w, {})) for key, w in self.factors(model).items()})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.on_step_begin(args, state, control, model=model)


def run(folder, period, **options):
    watch = Watch()
    trainer = make("freezing", folder, [watch], callback=SequentialFreezingCallback(period), **options)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_what_rests_keeps_its_bits_and_its_state(tmp_path, optim):
    trainer, watch = run(
        tmp_path, 3, weight_decay=0.3, optim=optim, optim_args="momentum=0.9" if optim == "sgd" else None
    )
    for step in range(8):
        resting = ("left", "right")[step // 3 % 2]
        for key in watch.before[0]:
            moved = not torch.equal(watch.before[step][key], watch.before[step + 1][key])
            assert moved == (key[1] != resting)
            assert watch.gradients[step][key] == (key[1] != resting)
            if step and key[1] == resting:
                now, then = watch.states[step][key], watch.states[step - 1][key]
                assert now.keys() == then.keys()
                assert all(torch.equal(now[entry], then[entry]) for entry in now)
    # The second turn of `right` goes on with the momentum of its first.
    assert all(state for state in watch.states[-1].values())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_turn_is_an_epoch_where_no_period_is_given(tmp_path):
    # 32 examples, 4 at a time.
    _, watch = run(tmp_path, None, max_steps=-1, num_train_epochs=2, learning_rate=1e-3)
    sides = [{key[1] for key, there in step.items() if there} for step in watch.gradients]
    assert sides == [{"right"}] * 8 + [{"left"}] * 8


def test_a_turn_is_training_with_one_factor_frozen(tmp_path):
    _, watch = run(tmp_path / "turns", 4)
    trainer = make("freezing", tmp_path / "frozen", callback=TrainerCallback(), max_steps=8)
    for layer in component_layers(trainer.model).values():
        layer.left.weight.requires_grad_(False)
    seen = Watch()
    seen.on_pre_optimizer_step = lambda *args, **kwargs: None
    trainer.add_callback(seen)
    trainer.train()
    for key, weight in watch.before[4].items():
        assert torch.equal(weight, seen.before[4][key])


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    for period in (0, True, 1.5):
        with pytest.raises(ConfigError, match=f"`period`={period} must be an integer of at least 1"):
            SequentialFreezingCallback(period)
    for period in (8, None):
        with pytest.raises(
            ConfigError, match=f"`period`={period} leaves no second turn in a run of 8 steps and 1 epochs"
        ):
            make("freezing", tmp_path, callback=SequentialFreezingCallback(period)).train()
    model = make("freezing", tmp_path).model
    options = {"fp16": False, "deepspeed_plugin": None, "world_size": 1, "ddp_find_unused_parameters": None}
    options = {**options, "activation_checkpointing": False}

    def begin(model, callback=None, **more):
        state = TrainerState(max_steps=10, num_train_epochs=2)
        callback = SequentialFreezingCallback() if callback is None else callback
        callback.on_train_begin(SimpleNamespace(**{**options, **more}), state, None, model=model)

    begin(model)
    begin(model, world_size=2)
    for more in ({"ddp_find_unused_parameters": False}, {"activation_checkpointing": True}):
        with pytest.raises(ConfigError, match="give TrainingArguments `ddp_find_unused_parameters`=True"):
            begin(model, world_size=2, **more)
    begin(model, world_size=2, activation_checkpointing=True, ddp_find_unused_parameters=True)
    with pytest.raises(ConfigError, match="`fp16`=True"):
        begin(model, fp16=True)
    with pytest.raises(TargetError, match="finds no `low_rank` layer in this LlamaForCausalLM"):
        begin(tiny_model("llama")[0])
    next(model.parameters()).ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split .* resting factors need whole weights"):
        begin(model)
    del next(model.parameters()).ds_id
    name, layer = next(iter(component_layers(model).items()))
    layer.right.weight.requires_grad_(False)
    with pytest.raises(TargetError, match=f"A factor of {name} is frozen.*broken off"):
        begin(model)
