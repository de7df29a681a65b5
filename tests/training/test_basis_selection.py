"""Basis selection with a real Trainer: what is tuned, what goes, and what is left of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from callback_worker import examples
from rank_training_worker import make
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback, TrainerState

from hf_lowrank import (
    ConfigError,
    LowRankLinear,
    RankError,
    TargetError,
    WeightedBasesLinear,
)
from hf_lowrank.methods import Factors
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import BasisSelectionCallback


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightedBasesLinear)}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


class Watch(TrainerCallback):
    """Notes the scales that are not zero after 0, 1, .. steps, what steps would change, and the model at the end."""

    def __init__(self):
        self.live, self.changes, self.end = [], [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = {name: layer for name, layer in layers_of(model).items() if layer.scale.grad is not None}
        change = {name: layer.scale.grad.double() * layer.scale.double() for name, layer in layers.items()}
        self.changes.append({name: (c.square() / 2 - c).detach() for name, c in change.items()})

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.live.append({name: layer.scale != 0 for name, layer in layers_of(model).items()})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.on_step_begin(args, state, control, model=model)
        self.end = copy.deepcopy(model)


def run(folder, model=None, **options):
    """`(trainer, watch)` after a run in which `watch` sees everything in front of the callback."""
    watch, trainer_options = Watch(), options.pop("trainer", {})
    callback = BasisSelectionCallback(**{"pruning_steps": 3, "rank_multiple": 4, **options})
    trainer = make("basis", folder, callback=callback, model=model, **trainer_options)
    trainer.callback_handler.callbacks.insert(0, watch)
    trainer.train()
    return trainer, watch


def test_without_pruning_and_bases_nothing_changes(tmp_path):
    dense, inputs = tiny_model("bert")
    before, expected = copy.deepcopy(dense.state_dict()), logits(dense, inputs())
    options = {"keep_mass": 1.0, "extra_rank": 0, "floor": 0, "trainer": {"learning_rate": 0.0}}
    trainer, watch = run(tmp_path, dense, **options)
    assert len(layers_of(watch.end)) == 12
    torch.testing.assert_close(logits(watch.end, inputs()), expected, rtol=0, atol=1e-5)
    # Of full rank, they are dense again: the weights that were there.
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    trainer.save_model(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_only_scales_and_added_bases_are_trained(tmp_path):
    fresh = make("basis", tmp_path, callback=BasisSelectionCallback(extra_rank=4, pruning_steps=3)).model
    before = copy.deepcopy(fresh.state_dict())
    _, watch = run(tmp_path, extra_rank=4, keep_mass=1.0)
    changed = {name for name, tensor in watch.end.state_dict().items() if not torch.equal(tensor, before[name])}
    changed.discard("basis_selection_run")
    names = [f"{name}.{part}" for name in layers_of(fresh) for part in ("scale", "added_left.weight")]
    added = [f"{name}.added_right.weight" for name in layers_of(fresh)]
    assert changed == {*names, *added}


@pytest.mark.parametrize("importance", ["magnitude", "taylor2"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_two_factors_compute_the_same(tmp_path, architecture, importance):
    model, inputs = tiny_model(architecture)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    for bias in biases:
        nn.init.normal_(bias.data)
    options = {"keep_mass": 0.15, "extra_rank": 3, "importance": importance, "rank_multiple": 8}
    trainer, watch = run(tmp_path, model, trainer={"learning_rate": 3e-2}, **options)
    expected = logits(watch.end, inputs())
    assert not layers_of(trainer.model)
    small = {name: m for name, m in trainer.model.named_modules() if isinstance(m, LowRankLinear)}
    assert small
    for name, layer in small.items():
        own = watch.end.get_submodule(name)
        count = int((own.scale != 0).sum()) + 3
        assert layer.rank == -(-count // 8) * 8
        assert torch.equal(layer.bias, own.bias)
        assert all(parameter.requires_grad for parameter in (layer.left.weight, layer.right.weight))
    torch.testing.assert_close(logits(trainer.model, inputs()), expected, rtol=0, atol=1e-5)
    trainer.save_model(tmp_path / "saved")
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, inputs()), logits(trainer.model, inputs()))


def test_bases_go_at_the_events_and_do_not_come_back(tmp_path):
    _, watch = run(tmp_path, keep_mass=0.3, extra_rank=0, trainer={"learning_rate": 3e-2})
    assert BasisSelectionCallback(pruning_steps=3).pruning_at(8) == [3, 4, 6]
    for name in watch.live[0]:
        live = [step[name] for step in watch.live]
        assert all(not (after & ~before).any() for before, after in zip(live, live[1:], strict=False))
        counts = [int(step.sum()) for step in live]
        assert counts[0] == counts[2] > counts[3] > counts[4] == counts[5] > counts[6] == counts[8] > 0


def bases(values, importance="magnitude", keep_mass=0.5, pruning_steps=1):
    """A layer with these squared scales, and a callback to prune it."""
    scale = torch.tensor(values, dtype=torch.float64)
    left, right = torch.eye(len(values)).double(), torch.eye(len(values)).double()
    layer = WeightedBasesLinear.from_factors(Factors(left * scale, right, 0.0))
    callback = BasisSelectionCallback(keep_mass, pruning_steps=pruning_steps, importance=importance)
    return layer, callback


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep_mass", [0.3, 0.9])
def test_the_smallest_set_with_the_mass_is_kept(seed, keep_mass):
    values = torch.rand(12, generator=torch.Generator().manual_seed(seed)).double()
    layer, callback = bases(values.tolist(), keep_mass=keep_mass, pruning_steps=2)
    with torch.no_grad():
        callback._prune(layer)
    kept = layer.scale != 0
    wanted = keep_mass**0.5 * values.sum()
    assert values[kept].sum() >= wanted
    # The best set with one basis less has not enough.
    assert values.sort(descending=True).values[: int(kept.sum()) - 1].sum() < wanted
    assert values[kept].min() > values[~kept].max()


def test_the_second_order_counts_what_the_loss_would_rise(tmp_path):
    """Importance is what the steps add up to, and starts anew after an event."""
    trainer = make("basis", tmp_path, callback=BasisSelectionCallback(importance="taylor2", pruning_steps=1))
    watch = Watch()
    trainer.callback_handler.callbacks.insert(0, watch)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            # After the event of step 6, and two steps.
            if state.global_step in (5, 8):
                scores = {
                    name: layer.get_buffer("basis_selection_importance") for name, layer in layers_of(model).items()
                }
                since = watch.changes[:5] if state.global_step == 5 else watch.changes[6:]
                for name, found in scores.items():
                    expected = sum(step[name] for step in since)
                    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
                self.seen = self.__dict__.get("seen", 0) + 1

    stop = Stop()
    trainer.add_callback(stop)
    trainer.train()
    assert stop.seen == 2


def test_what_the_data_does_not_use_goes_first_by_the_second_order(tmp_path):
    class Toy(nn.Module):
        """A layer whose largest singular value the inputs never reach."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.layer.weight.data = torch.diag(torch.tensor([9.0, 2.0, 1.0, 0.5]))

        def forward(self, input_ids, labels):
            x = torch.cat([torch.zeros(len(input_ids), 1), input_ids[:, :3].float() / 40], dim=1)
            return {"loss": (self.layer(x) - labels[:, 4:8].float() / 20).square().mean()}

    for importance, gone in (("magnitude", [1, 2, 3]), ("taylor2", [0])):
        options = {"importance": importance, "pruning_steps": 1, "warmup_fraction": 0.5, "pruning_fraction": 0.5}
        callback = BasisSelectionCallback(0.6, 0, rank_multiple=1, target_modules="layer", **options)
        trainer = make("basis", tmp_path / importance, model=Toy(), callback=callback)
        watch = Watch()
        trainer.callback_handler.callbacks.insert(0, watch)
        trainer.train()
        ((name, layer),) = layers_of(watch.end).items()
        # By the input that a basis reads.
        reads = layer.right.weight.abs().argmax(1)
        assert set(gone) <= set(reads[layer.scale == 0].tolist())
        assert (0 in reads[layer.scale == 0]) == (importance == "taylor2")


def test_a_checkpoint_of_the_run_loads_and_goes_on(tmp_path):
    options = {"keep_mass": 0.3, "extra_rank": 4, "target_modules": ["q_proj", "up_proj"]}
    _, watch = run(tmp_path, trainer={"save_strategy": "steps", "save_steps": 4}, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    inputs = tiny_model("llama")[1]()
    layers = layers_of(model)
    assert len(layers) == 4
    for name, layer in layers.items():
        assert layer.extra_rank == 4
        assert torch.equal(layer.scale != 0, watch.live[4][name])
    for child in ("left", "right"):
        name = next(iter(layers))
        assert torch.equal(getattr(layers[name], child).weight, getattr(watch.end.get_submodule(name), child).weight)
    before = logits(model, inputs)
    # A new run takes the bases as they are.
    trainer = make(
        "basis", tmp_path / "more", model=model, callback=BasisSelectionCallback(pruning_steps=3, **options)
    )
    assert torch.equal(logits(trainer.model, inputs), before)
    trainer.train()


def test_a_new_classifier_is_trained_where_it_is_named(tmp_path):
    dense = tiny_model("bert")[0]
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", num_labels=2)
    callback = BasisSelectionCallback(pruning_steps=1, extra_rank=2, modules_to_save=["classifier"])
    rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(examples())]
    trainer = make("basis", tmp_path, model=model, callback=callback)
    trainer.train_dataset = rows
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < names
    assert all(name.startswith("classifier") or ".scale" in name or ".added_" in name for name in names)
    before = trainer.model.classifier.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.classifier.weight, before)


def test_small_singular_values_are_left_out(tmp_path):
    model, _ = tiny_model("llama")
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            u, s, v = torch.linalg.svd(module.weight.data)
            s[40:] = 1e-4 * s.mean()
            module.weight.data = u @ torch.diag(s) @ v
    trainer = make("basis", tmp_path, model=model, callback=BasisSelectionCallback(target_modules=["q_proj"]))
    assert {layer.scale.numel() for layer in layers_of(trainer.model).values()} == {40}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_mass": 0}, r"`keep_mass`=0 must be a number in \(0, 1\]"),
        ({"extra_rank": -1}, "`extra_rank`=-1 must be an integer of at least 0"),
        ({"pruning_steps": 0}, "`pruning_steps`=0 must be an integer of at least 1"),
        ({"warmup_fraction": 0.6}, "`warmup_fraction`=0.6 and `pruning_fraction`=0.5 are more than the run"),
        ({"importance": "fisher"}, "`importance`='fisher' must be one of"),
        ({"rank_multiple": 0}, "`rank_multiple`=0"),
        ({"floor": -1}, "`floor`=-1"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        BasisSelectionCallback(**options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="`pruning_steps`=50 exceeds the 4 optimizer steps"):
        make("basis", tmp_path, callback=BasisSelectionCallback(target_modules=["q_proj"])).train()
    with pytest.raises(RankError, match="rank=65 for the bases added to model.layers.0.self_attn.q_proj"):
        make("basis", tmp_path, callback=BasisSelectionCallback(extra_rank=65, target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="`modules_to_save`=.*matches no module"):
        make("basis", tmp_path, callback=BasisSelectionCallback(target_modules=["q_proj"], modules_to_save=["score"]))
    split = make("basis", tmp_path)
    next(split.model.parameters()).ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split .* BasisSelectionCallback need whole weights"):
        split.train()
    with pytest.raises(ConfigError, match="`fp16`=True"):
        BasisSelectionCallback().on_init_end(SimpleNamespace(fp16=True), None, None, model=tiny_model("llama")[0])
    with pytest.raises(TargetError, match="finds no layer with bases in this LlamaForCausalLM"):
        BasisSelectionCallback().on_train_begin(None, TrainerState(), None, model=tiny_model("llama")[0])


@pytest.mark.parametrize("importance", ["magnitude", "taylor2"])
def test_a_layer_that_is_not_used_is_no_obstacle_and_all_is_trained_again(tmp_path, importance):
    model = tiny_model("llama")[0]
    model.model.register_module("unused", nn.Linear(16, 16))
    model.model.embed_tokens.requires_grad_(False)
    trainer, _ = run(tmp_path, model, importance=importance, extra_rank=2)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
