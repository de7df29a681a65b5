"""Pruning with a real Trainer: the masks, the gradients that pass them, what is left, and runs that stop and go on."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from callback_worker import STEPS, examples, make
from processes import run_script
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import (
    CheckpointError,
    ConfigError,
    FirstOrderPruningCallback,
    LowRankConfig,
    TargetError,
    factorize,
)
from hf_lowrank.linalg import largest
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


WORKER = Path(__file__).parents[1] / "callback_worker.py"
TARGETS = ["q_proj", "up_proj", "down_proj"]
# Warm-up 2, pruning up to step 6, cool-down.
OPTIONS = {"keep_fraction": 0.3, "warmup_steps": 2, "cooldown_steps": 2, "target_modules": TARGETS}


def buffers(model, name):
    """`{weight name: buffer}`."""
    suffix = f"first_order_pruning_weight_{name}"
    return {k.removesuffix(suffix) + "weight": v for k, v in model.named_buffers() if k.endswith(suffix)}


class Watch(TrainerCallback):
    """What stands in the model after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        names = ("mask", "dense", "score")
        found = {name: {k: v.clone() for k, v in buffers(model, name).items()} for name in names}
        found["weight"] = {name: model.get_parameter(name).detach().clone() for name in found["mask"]}
        self.steps.append(found)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_schedule():
    keep = FirstOrderPruningCallback(keep_fraction=0.2, warmup_fraction=0.1, cooldown_fraction=0.3).keep_at
    assert [keep(step, 100) for step in (0, 10, 70, 71, 100)] == [1, 1, 0.2, 0.2, 0.2]
    assert keep(40, 100) == pytest.approx(0.2 + 0.8 / 8)
    assert keep(25, 100) == pytest.approx(0.2 + 0.8 * 0.75**3)
    keep = FirstOrderPruningCallback(
        keep_fraction=0.2, initial_keep_fraction=0.6, warmup_steps=0, cooldown_steps=0
    ).keep_at
    assert [keep(0, 10), keep(5, 10), keep(10, 10)] == [0.6, pytest.approx(0.2 + 0.4 / 8), 0.2]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("score", ["movement", "taylor", "magnitude"])
def test_masks_are_exact_at_every_step(tmp_path, score, scope):
    pruning, watch = FirstOrderPruningCallback(score=score, scope=scope, **OPTIONS), Watch()
    trainer = make(tmp_path, pruning, watch)
    trainer.train()
    fractions = []
    for step, found in enumerate(watch.steps, start=1):
        keep, masks = pruning.keep_at(step, STEPS), found["mask"]
        assert len(masks) == 6
        if scope == "local":
            assert all(int(mask.sum()) == round(keep * mask.numel()) for mask in masks.values())
        else:
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == round(keep * total)
        for name, mask in masks.items():
            assert torch.equal(found["weight"][name], torch.where(mask, found["dense"][name], 0)), name
            fractions.append(float(mask.float().mean()))
        scores = {n: t.abs() for n, t in found["dense"].items()} if score == "magnitude" else found["score"]
        if scope == "global":
            expected = largest(list(scores.values()), keep)
        else:
            expected = [largest([one], keep)[0] for one in scores.values()]
        assert all(torch.equal(mask, wanted) for mask, wanted in zip(masks.values(), expected, strict=True))
    assert fractions[:6] == [1] * 6, "the warm-up"
    if scope == "global":
        assert max(fractions[-6:]) > min(fractions[-6:]) + 0.005, "each matrix keeps another part"
    finished = {name: trainer.model.get_parameter(name).detach() for name in watch.steps[-1]["weight"]}
    assert_same(finished, watch.steps[-1]["weight"])


def test_weights_come_back(tmp_path):
    watch = Watch()
    make(tmp_path, FirstOrderPruningCallback("taylor", decay=0.0, **OPTIONS), watch).train()
    before, after = (watch.steps[step]["mask"] for step in (5, 7))
    assert any((after[name] & ~mask).any() for name, mask in before.items())
    # The pruned ones were trained on.
    dense = [watch.steps[step]["dense"] for step in (5, 6)]
    assert all((dense[0][name] != dense[1][name])[~mask].any() for name, mask in before.items())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 10, dtype=torch.float64), nn.Linear(10, 3, dtype=torch.float64)

    def forward(self, inputs, labels):
        logits = self.last(self.first(inputs).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("score", ["movement", "taylor"])
def test_gradients_pass_straight_through_the_masks(tmp_path, score):
    generator = torch.Generator().manual_seed(0)
    data = [{"inputs": x, "labels": y} for x, y in zip(
        torch.randn(16, 6, generator=generator, dtype=torch.float64),
        torch.randint(3, (16,), generator=generator),
        strict=True,
    )]  # fmt: skip
    model = Net()
    ours = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    pruning = FirstOrderPruningCallback(score, 0.4, warmup_steps=1, cooldown_steps=1, decay=0.6)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=16, report_to=[], use_cpu=True, save_strategy="no",
        max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    Trainer(
        model, arguments, train_dataset=data, callbacks=[pruning],
        optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)),
    ).train()  # fmt: skip

    weights = ["first.weight", "last.weight"]
    masks, sums = {name: torch.ones_like(ours[name]) for name in weights}, dict.fromkeys(weights, 0.0)
    optimizer = torch.optim.SGD(ours.values(), lr=0.5, momentum=0.9)
    batch = {key: torch.stack([row[key] for row in data]) for key in ("inputs", "labels")}
    for step in range(1, 7):
        used = {name: (p * masks[name] if name in masks else p).detach().requires_grad_() for name, p in ours.items()}
        torch.func.functional_call(model, used, kwargs=batch)["loss"].backward()
        for name, parameter in ours.items():
            parameter.grad = used[name].grad
        for name in weights:
            product = (ours[name] * ours[name].grad).detach()
            sums[name] = sums[name] - product if score == "movement" else 0.6 * sums[name] + 0.4 * product.abs()
        optimizer.step()
        for name in weights:
            keep = round(pruning.keep_at(step, 6) * masks[name].numel())
            rank = sums[name].flatten().argsort(descending=True)[:keep]
            masks[name] = torch.zeros_like(ours[name]).flatten().index_fill(0, rank, 1).view_as(ours[name])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), ours[name].detach() * masks.get(name, 1))
        assert not (name in masks and torch.equal(masks[name], torch.ones_like(parameter)))


def test_micro_batches_are_one_batch(tmp_path):
    options = {"score": "movement", **OPTIONS}
    ends = []
    for sizes in ((8, 1), (4, 2)):
        watch = Watch()
        arguments = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
        make(tmp_path, FirstOrderPruningCallback(**options), watch, max_steps=5, **arguments).train()
        ends.append(watch.steps[1]["score"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-7)


def test_a_finished_model_is_an_ordinary_one(tmp_path):
    plain = tiny_model("llama")[0]
    trainer = make(tmp_path / "run", FirstOrderPruningCallback(**OPTIONS))
    assert {type(m) for m in trainer.model.modules()} == {type(m) for m in plain.modules()}
    trainer.train()
    model = trainer.model
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert vars(model).keys() - vars(plain).keys() == {"_is_accelerate_prepared"}
    for site in match_sites(model, TARGETS):
        weight = model.get_parameter(site.weight_name)
        assert int((weight != 0).sum()) == round(0.3 * weight.numel())
    trainer.save_model(str(tmp_path / "saved"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(again.state_dict(), model.state_dict())


def test_a_checkpoint_is_the_pruned_model_that_was_evaluated(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    trainer = make(tmp_path, FirstOrderPruningCallback(**OPTIONS), **often)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5").eval()
    batch = torch.stack([row["input_ids"] for row in examples(4)])
    with torch.no_grad():
        assert float(model(batch, labels=batch).loss) == pytest.approx(losses[5], rel=1e-6)
    keep = FirstOrderPruningCallback(**OPTIONS).keep_at(5, STEPS)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight != 0).sum()) == round(keep * weight.numel())


@pytest.mark.parametrize("score", ["movement", "taylor", "magnitude"])
def test_going_on_from_any_step_ends_in_the_same_bits(tmp_path, score):
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = make(tmp_path, FirstOrderPruningCallback(score, scope="global", **OPTIONS), **saving)
    whole.train()
    for step in (1, 2, 4, 6, 7):
        again = make(tmp_path, FirstOrderPruningCallback(score, scope="global", **OPTIONS), max_steps=STEPS,
                     gradient_accumulation_steps=2)  # fmt: skip
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(again.model.state_dict(), whole.model.state_dict())


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    def run(folder, processes=1, **options):
        folder.mkdir(exist_ok=True)
        asked = {"folder": str(folder), "name": "FirstOrderPruningCallback", "options": OPTIONS, **options}
        return run_script(WORKER, json.dumps(asked), processes=processes)

    killed = run(tmp_path / "killed", kill=4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "killed", resume=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = make(tmp_path / "whole", FirstOrderPruningCallback(**OPTIONS))
    whole.train()
    assert_same(torch.load(tmp_path / "killed" / "state_0.pt"), whole.model.state_dict())
    two = run(tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stdout + two.stderr
    states = [torch.load(tmp_path / "two" / f"state_{rank}.pt") for rank in (0, 1)]
    assert_same(*states)
    weight = states[0]["model.layers.0.mlp.up_proj.weight"]
    assert int((weight != 0).sum()) == round(0.3 * weight.numel())
    # Batches of both together are those of one process with twice the micro-batches.
    alone = make(tmp_path / "one", FirstOrderPruningCallback(**OPTIONS), per_device_train_batch_size=8)
    alone.train()
    same = alone.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert ((same != 0) == (weight != 0)).float().mean() > 0.99


def test_trainer_may_restore_the_callback(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    whole = make(tmp_path, FirstOrderPruningCallback(**OPTIONS), **options)
    whole.train()
    other = make(tmp_path, FirstOrderPruningCallback(**(OPTIONS | {"keep_fraction": 0.9})), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(whole.model.state_dict(), other.model.state_dict())


def test_a_second_run_begins_anew(tmp_path):
    trainer = make(tmp_path, FirstOrderPruningCallback(**OPTIONS))
    trainer.train()
    first = state(trainer.model)
    trainer.train()
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    assert int((weight != 0).sum()) == round(0.3 * weight.numel())
    assert not torch.equal(weight, first["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_scores_become_statistics(tmp_path, architecture):
    model = tiny_model(architecture)[0]
    pruning, last = FirstOrderPruningCallback("taylor", 0.5, keep_scores=True), {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            last.update((name, tensor.clone()) for name, tensor in model.named_buffers() if "pruning" in name)

    trainer = make(tmp_path / "run", pruning, Look(), model=model)
    names = set(model.state_dict()) - set(last)
    trainer.train()
    assert not any("pruning" in name for name in model.state_dict()) and names >= set(model.state_dict())
    pruning.statistics(model).save(tmp_path / "importance.safetensors")
    statistics = pruning.statistics(model)
    sites = match_sites(model)
    for site in sites:
        owner, _, leaf = site.weight_name.rpartition(".")
        score, mask = (last[f"{owner}.first_order_pruning_{leaf}_{name}"] for name in ("score", "mask"))
        kept = site.kind.oriented(model, site, score.double() * mask)
        found = statistics.get(site.name, ["importance_columns", "importance_rows"])
        assert found["importance_columns"].shape == (site.in_features,)
        torch.testing.assert_close(found["importance_columns"], kept.sum((0, 1)))
        torch.testing.assert_close(found["importance_rows"], kept.sum((0, 2)))
    config = LowRankConfig(method="lpaf", param_ratio=0.5, calibration=str(tmp_path / "importance.safetensors"))
    factorize(model, config)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same(again.state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match="no scores in this .*keep_scores=True"):
        pruning.statistics(tiny_model(architecture)[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": "hessian"}, r"`score`='hessian' must be one of \['movement', 'taylor', 'magnitude'\]"),
        ({"scope": "layer"}, "`scope`='layer' must be one of"),
        ({"keep_fraction": 0}, r"`keep_fraction`=0 must be a number in \(0, 1\]"),
        ({"keep_fraction": 0.5, "initial_keep_fraction": 0.4}, r"`initial_keep_fraction`=0.4 must be.*in \[0.5, 1\]"),
        ({"warmup_fraction": -0.1}, r"`warmup_fraction`=-0.1 must be a number in \[0, 1\]"),
        ({"cooldown_steps": 1.5}, "`cooldown_steps`=1.5 must be an integer of at least 0"),
        ({"decay": 1}, "`decay`=1 would never look"),
        ({"keep_scores": "yes"}, "`keep_scores`='yes' must be True or False"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        FirstOrderPruningCallback(**options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    def refused(error, match, options=OPTIONS, model=None, **arguments):
        model = tiny_model("llama")[0] if model is None else model
        before = state(model)
        with pytest.raises(error, match=match):
            make(tmp_path, FirstOrderPruningCallback(**options), model=model, **arguments).train()
        after = {name: tensor for name, tensor in model.state_dict().items() if "first_order_pruning" not in name}
        assert_same(before, after)

    nothing = OPTIONS | {"target_modules": ["qq_proj"]}
    refused(TargetError, "`target_modules`='qq_proj' matches no linear layer", nothing)
    refused(ConfigError, "of 2 steps and the cool-down of 6 leave none of the 8", OPTIONS | {"cooldown_steps": 6})
    refused(ConfigError, "warm-up of 11 steps", OPTIONS | {"warmup_steps": 11})
    frozen = tiny_model("llama")[0]
    frozen.model.layers[1].mlp.down_proj.requires_grad_(False)
    refused(TargetError, "names model.layers.1.mlp.down_proj, whose weight is frozen", model=frozen)
    factorized = factorize(tiny_model("llama")[0], LowRankConfig(method="svd", param_ratio=0.5))
    refused(TargetError, "`target_modules`='q_proj' matches no linear layer", model=factorized)
    split = tiny_model("llama")[0]
    trainer = make(tmp_path, FirstOrderPruningCallback(**OPTIONS), model=split)
    split.lm_head.weight.ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split lm_head.weight, and the weights of FirstOrder"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"load_best_model_at_end": True}, "`load_best_model_at_end`=True would bring a model of before the end"),
        ({"fp16": True}, "`fp16`=True of.*FirstOrderPruningCallback is not told"),
        ({"deepspeed_plugin": 1}, "DeepSpeed"),
    ],
)
def test_arguments_are_refused_when_trainer_is_made(arguments, match):
    # Not all can be set on a machine without GPU or DeepSpeed.
    asked = SimpleNamespace(**({"fp16": False, "deepspeed_plugin": None, "load_best_model_at_end": False} | arguments))
    with pytest.raises(ConfigError, match=match):
        FirstOrderPruningCallback().on_init_end(asked, None, None, model=tiny_model("llama")[0])


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make(tmp_path / "plain", **saving).train()
    with pytest.raises(CheckpointError, match="checkpoint of step 3 brought no state for FirstOrderPruningCallback"):
        make(tmp_path, FirstOrderPruningCallback(**OPTIONS)).train(str(tmp_path / "plain" / "checkpoint-3"))
    make(tmp_path / "pruned", FirstOrderPruningCallback(**OPTIONS), **saving).train()
    more = FirstOrderPruningCallback(**(OPTIONS | {"target_modules": [*TARGETS, "v_proj"]}))
    with pytest.raises(CheckpointError, match="or that of other layers"):
        make(tmp_path, more).train(str(tmp_path / "pruned" / "checkpoint-3"))
    late = make(tmp_path)
    late.add_callback(FirstOrderPruningCallback(**OPTIONS))
    with pytest.raises(CheckpointError, match="this callback among its `callbacks`"):
        late.train(str(tmp_path / "pruned" / "checkpoint-3"))
