"""Trained rank pruning with a real Trainer: projections, the nuclear norm, factors at the end, runs that go on."""

import copy
import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from callback_worker import STEPS, make
from processes import run_script
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import CheckpointError, ConfigError, TargetError, TrainedRankPruningCallback, summary
from hf_lowrank.testing import tiny_model


WORKER = Path(__file__).parents[1] / "callback_worker.py"
TARGETS = ["q_proj", "up_proj", "down_proj"]
OPTIONS = {"energy": 0.9, "period": 3, "target_modules": TARGETS}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def svd(weight):
    return torch.linalg.svd(weight.detach().double(), full_matrices=False)


class Watch(TrainerCallback):
    """Weights before a step, as the forward pass sees them, and after it; gradients between."""

    def __init__(self, names):
        self.names, self.before, self.after, self.gradients = names, [], [], []

    def take(self, model):
        return {name: model.get_parameter(f"{name}.weight").detach().clone() for name in self.names}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after.append(self.take(model))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(self.take(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: model.get_parameter(f"{n}.weight").grad.clone() for n in self.names})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(self.take(model))


NAMES = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_period_of_optimizer_steps_weights_are_projected(tmp_path, accumulate):
    pruning, watch = TrainedRankPruningCallback(nuclear_weight=0.0, factorize_at_end=False, **OPTIONS), Watch(NAMES)
    trainer = make(tmp_path, pruning, watch, gradient_accumulation_steps=accumulate)
    trainer.train()
    for step in range(STEPS):
        for name in NAMES:
            weight, used = watch.after[step][name], watch.before[step][name]
            if step % 3:
                assert torch.equal(weight, used), "weights are free in between"
                continue
            u, s, v = svd(weight)
            kept = s.square().cumsum(0) / s.square().sum()
            rank = int((kept < 0.9).sum()) + 1
            assert 1 < rank < len(s)
            torch.testing.assert_close(used.double(), (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-5, atol=1e-6)
            assert int((svd(used)[1] > 1e-5).sum()) == rank
            if step == 6:
                assert pruning.ranks(trainer.model)[name] == rank
    assert list(pruning.ranks(trainer.model)) == NAMES
    assert not any("rank_pruning" in name for name in trainer.model.state_dict())


def test_with_nothing_to_cut_and_no_norm_it_is_plain_training(tmp_path):
    options = {"nuclear_weight": 0.0, "period": 1, "energy": 1.0, "factorize_at_end": False}
    for mode in ("prox", "subgradient"):
        ours = make(tmp_path, TrainedRankPruningCallback(nuclear_mode=mode, **options))
        plain = make(tmp_path)
        # Of a matrix of low rank, too: rounding is not cut off.
        for model in (ours.model, plain.model):
            model.model.layers[0].mlp.up_proj.weight.data[:, 5:] = 0
        ours.train()
        plain.train()
        assert_same(ours.model.state_dict(), plain.model.state_dict())


def test_the_subgradient_of_these_steps_only(tmp_path):
    pruning, watch = (
        TrainedRankPruningCallback(nuclear_mode="subgradient", nuclear_weight=0.3, **OPTIONS),
        Watch(NAMES),
    )
    plain = Watch(NAMES)
    trainer = make(tmp_path, plain, pruning, watch, max_grad_norm=0.0, max_steps=5, gradient_accumulation_steps=2)
    # Reported before and after the callback has worked.
    trainer.train()
    for step in range(5):
        for name in NAMES:
            added = watch.gradients[step][name] - plain.gradients[step][name]
            if step % 3:
                assert not added.any()
                continue
            u, s, v = svd(watch.before[step][name])
            rank = int((s > 1e-5).sum())
            torch.testing.assert_close(added.double(), 0.3 * u[:, :rank] @ v[:rank], rtol=1e-3, atol=1e-5)


def test_the_proximal_step_has_the_learning_rate_of_the_step(tmp_path):
    options = {"energy": 1.0, "period": 2, "nuclear_weight": 20.0, "factorize_at_end": False}
    watch = Watch(NAMES)
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = make(tmp_path, TrainedRankPruningCallback(target_modules=TARGETS, **options), watch, Rates(),
                   lr_scheduler_type="linear", warmup_steps=2)  # fmt: skip
    trainer.train()
    assert rates[0] == 0 and rates[2] > rates[4] > 0
    for step in range(STEPS):
        for name in NAMES:
            weight, used = watch.after[step][name], watch.before[step][name]
            if step % 2 or not rates[step]:
                assert torch.equal(weight, used)
                continue
            u, s, v = svd(weight)
            torch.testing.assert_close(
                used.double(), (u * (s - 20 * rates[step]).clamp(min=0)) @ v, rtol=1e-5, atol=1e-6
            )


def test_adaptive_optimizers_and_subgradients_are_warned_of(tmp_path, caplog):
    def said(optimizer, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_lowrank"):
            make(tmp_path, TrainedRankPruningCallback(**OPTIONS, **options), optim=optimizer, max_steps=3).train()
        return "adaptive optimizer normalizes" in caplog.text

    assert said("adamw_torch", nuclear_mode="subgradient")
    assert not said("sgd", nuclear_mode="subgradient")
    assert not said("adamw_torch")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, inputs, labels):
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_truncation_after_this_training_costs_nothing_and_without_it_much(tmp_path):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    data = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

    def loss(model):
        with torch.no_grad():
            return float(model(inputs, labels)["loss"])

    def trained(*callbacks):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=120, per_device_train_batch_size=64, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        model = Net()
        Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()
        return model

    def truncated(model, ranks):
        model = copy.deepcopy(model)
        for name, rank in ranks.items():
            weight = model.get_submodule(name).weight
            u, s, v = svd(weight)
            weight.data = ((u[:, :rank] * s[:rank]) @ v[:rank]).float()
        return model

    pruning = TrainedRankPruningCallback(energy=0.95, period=5, factorize_at_end=False)
    ours, twin = trained(pruning), trained()
    ranks = pruning.ranks(ours)
    assert ranks["layers.2"] < 8, "of 64"
    start, untreated = loss(Net()), loss(twin)
    assert max(loss(ours), untreated) < 0.1 * start, "both have learned the task"
    assert loss(truncated(ours, ranks)) == pytest.approx(loss(ours), rel=0.01)
    assert loss(truncated(twin, ranks)) > 1.5 * untreated


def test_training_ends_with_factors_where_they_are_smaller_that_load_anywhere(tmp_path):
    pruning, watch = TrainedRankPruningCallback(**OPTIONS), Watch(NAMES)
    recorded = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            recorded.update(pruning.ranks(model))

    trainer = make(tmp_path / "run", watch, pruning, Look())
    # A flat spectrum has no low rank.
    nn.init.orthogonal_(trainer.model.model.layers[0].mlp.up_proj.weight)
    trainer.train()
    rows = {row.name: row for row in summary(trainer.model).rows}
    smaller = {name: rank for name, rank in recorded.items() if "0.mlp.up_proj" not in name}
    assert len(smaller) == 5 and recorded["model.layers.0.mlp.up_proj"] * (64 + 96) > 64 * 96
    assert {name: row.rank for name, row in rows.items()} == smaller
    for name, row in rows.items():
        u, s, v = svd(watch.after[-1][name])
        made = trainer.model.get_submodule(name).dense_weight().detach().double()
        torch.testing.assert_close(made, (u[:, : row.rank] * s[: row.rank]) @ v[: row.rank], rtol=1e-4, atol=1e-5)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "small"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(again.state_dict(), trainer.model.state_dict())
    assert make(tmp_path, model=again).evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-6)
    for options in ({}, {"target_modules": ["v_proj"]}):
        with pytest.raises(TargetError, match=r"is factorized already, .*call hf_lowrank.to_dense\(model\) first"):
            make(tmp_path, TrainedRankPruningCallback(**options), model=again)
    with pytest.raises(TargetError, match="matches no linear layer"):
        make(tmp_path, TrainedRankPruningCallback(target_modules=["q_proj"], factorize_at_end=False), model=again)


def test_a_budget_of_parameters(tmp_path):
    pruning = TrainedRankPruningCallback(param_ratio=0.4, period=4)
    trainer = make(tmp_path, pruning)
    trainer.train()
    for row in summary(trainer.model).rows:
        rows, columns = (int(size) for size in row.shape.split(" x "))
        assert row.rank == int(0.4 * rows * columns / (rows + columns))
    assert len(summary(trainer.model).rows) == 14
    assert trainer.model.config.quantization_config.recipe["param_ratio"] == 0.4


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_other_layouts(tmp_path, architecture):
    trainer = make(tmp_path / "run", TrainedRankPruningCallback(param_ratio=0.4, period=4),
                   model=tiny_model(architecture)[0])  # fmt: skip
    trainer.train()
    assert summary(trainer.model).rows
    trainer.save_model(str(tmp_path / "small"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same(again.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("mode", ["prox", "subgradient"])
def test_going_on_from_any_step_ends_in_the_same_bits(tmp_path, mode):
    options = OPTIONS | {"nuclear_mode": mode, "nuclear_weight": 0.1}
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = make(tmp_path, TrainedRankPruningCallback(**options), **saving)
    whole.train()
    for step in (2, 3, 4, 7):
        again = make(tmp_path, TrainedRankPruningCallback(**options), gradient_accumulation_steps=2)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(again.model.state_dict(), whole.model.state_dict())


def run(folder, processes=1, **options):
    folder.mkdir(exist_ok=True)
    asked = {"folder": str(folder), "name": "TrainedRankPruningCallback", "options": OPTIONS, **options}
    return run_script(WORKER, json.dumps(asked), processes=processes)


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    killed = run(tmp_path, kill=4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = make(tmp_path / "whole", TrainedRankPruningCallback(**OPTIONS))
    whole.train()
    assert_same(torch.load(tmp_path / "state_0.pt"), whole.model.state_dict())


def test_two_processes_end_in_the_same_weights(tmp_path):
    options = OPTIONS | {"nuclear_mode": "subgradient", "nuclear_weight": 0.1}
    two = run(tmp_path, processes=2, options=options)
    assert two.returncode == 0, two.stdout + two.stderr
    states = [torch.load(tmp_path / f"state_{rank}.pt") for rank in (0, 1)]
    assert_same(*states)
    # Batches of both together are those of one process with twice the micro-batches.
    alone = make(tmp_path / "one", TrainedRankPruningCallback(**options), per_device_train_batch_size=8)
    alone.train()
    assert alone.model.state_dict().keys() == states[0].keys()
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(alone.model.state_dict()[embedding], states[0][embedding], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"energy": 1.5}, r"`energy`=1.5 must be a number in \(0, 1\]"),
        ({"energy": 0.9, "param_ratio": 0.5}, "Give one budget, not `energy`=0.9 and `param_ratio`=0.5"),
        ({"param_ratio": 0}, r"`param_ratio`=0 must be a number in \(0, 1\]"),
        ({"period": 0}, "`period`=0 must be an integer of at least 1"),
        ({"nuclear_weight": -1}, "`nuclear_weight`=-1 must be a number of at least 0"),
        ({"nuclear_mode": "norm"}, r"`nuclear_mode`='norm' must be one of \['prox', 'subgradient'\]"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        TrainedRankPruningCallback(**options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    model = tiny_model("llama")[0]
    before = state(model)
    with pytest.raises(TargetError, match="`target_modules`='qq_proj' matches no linear layer"):
        make(tmp_path, TrainedRankPruningCallback(target_modules=["qq_proj"]), model=model)
    with pytest.raises(ConfigError, match="`period`=20 exceeds the 8 steps of the run"):
        make(tmp_path, TrainedRankPruningCallback(), model=model).train()
    after = {name: tensor for name, tensor in model.state_dict().items() if "rank_pruning" not in name}
    assert_same(before, after)
    make(tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(CheckpointError, match="checkpoint of step 3 brought no state for TrainedRankPruningCallback"):
        make(tmp_path, TrainedRankPruningCallback(**OPTIONS)).train(str(tmp_path / "checkpoint-3"))
