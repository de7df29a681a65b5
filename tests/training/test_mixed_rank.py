"""Mixed-rank fine-tuning with a real Trainer: the schedule, the two passes, and runs that stop and go on."""

import signal
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from callback_worker import examples
from mixed_rank_worker import STEPS, make
from processes import run_script
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_lowrank import ConfigError, MixedRankCallback, MixedRankConfig, MixedRankTrainer, TargetError
from hf_lowrank.draws import draw, draws, two_branch_layers
from hf_lowrank.testing import tiny_model


WORKER = Path(__file__).parents[1] / "mixed_rank_worker.py"


class Watch(TrainerCallback):
    """Notes what is drawn in every micro-batch."""

    def __init__(self):
        self.steps = {}

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        found = [layer.drawn for layer in two_branch_layers(model).values()]
        self.steps.setdefault(state.global_step, []).append(found)

    on_pre_optimizer_step = on_substep_end


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def run(folder, kill=-1, resume="no", consistency=1.0, accumulate=1, base="dense", processes=1):
    folder.mkdir(exist_ok=True)
    return run_script(WORKER, folder, kill, resume, consistency, accumulate, base, processes=processes)


@pytest.mark.parametrize(
    ("options", "max_steps", "expected"),
    [
        ({}, 8, [0.5, 0.375, 0.25, 0.125, 0, 0, 0, 0]),
        ({"probability": 0.8, "anneal_fraction": 1.0}, 4, [0.8, 0.6, 0.4, 0.2]),
        ({"probability": 1.0, "anneal_steps": 2}, 4, [1.0, 0.5, 0, 0]),
        ({"probability": 0.0}, 3, [0, 0, 0]),
    ],
)
def test_schedule(options, max_steps, expected):
    callback = MixedRankCallback(**options)
    found = [callback.probability_at(step, max_steps) for step in range(max_steps)]
    assert found == pytest.approx(expected, abs=1e-15)


def test_each_step_has_its_draws_and_the_end_is_the_factors_alone(tmp_path):
    watch = Watch()
    trainer = make(tmp_path, 0.0, callbacks=[watch], gradient_accumulation_steps=2)
    base = {name: t.clone() for name, t in trainer.model.state_dict().items() if "base_layer" in name}
    trainer.train()
    layers = two_branch_layers(trainer.model)
    for step in range(STEPS):
        probability = 0.9 * max(0, 1 - step / 6)
        expected = draws(len(layers), probability, 5, step)
        assert watch.steps[step] == [expected] * 2, "one draw for all micro-batches"
    assert {True, False} == set(sum(watch.steps[1][0:1] + watch.steps[4][0:1], []))
    assert not any(watch.steps[6][0] + watch.steps[7][0])
    assert_same({name: t for name, t in trainer.model.state_dict().items() if name in base}, base)
    assert all(layer.drawn is None for layer in layers.values())


def test_training_helps_and_ends_in_a_factorized_model(tmp_path):
    trainer = make(tmp_path, steps=40, anneal_steps=20, config=MixedRankConfig(param_ratio=0.4), learning_rate=1e-2)
    # The head is frozen, and a random one leaves little to be learned in front of it.
    trainer.model.get_base_model().lm_head.weight.data *= 10
    batch = {"input_ids": torch.stack([example["input_ids"] for example in examples()])}
    batch["labels"] = batch["input_ids"]

    def loss(model):
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss(trainer.model)
    trainer.train()
    after = loss(trainer.model)
    assert after < 0.9 * before
    finished = trainer.model.merge_and_unload()
    finished.save_pretrained(tmp_path / "small")
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path / "small")) == after


def batch_of(*lengths):
    ids = torch.stack([example["input_ids"] for example in examples(len(lengths))])
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("consistency", ["kl", "mse"])
def test_the_loss_of_two_passes(tmp_path, consistency):
    trainer = make(tmp_path, consistency=0.7)
    trainer.consistency = consistency
    trainer.state = TrainerState(max_steps=STEPS, global_step=2)
    model, inputs, probability = trainer.model.train(), batch_of(12, 7, 9), 0.9 * (1 - 2 / 6)
    # A random model predicts all tokens alike, whatever its layers do.
    model.get_base_model().lm_head.weight.data *= 50
    for layer in two_branch_layers(model).values():
        layer.mixed_rank_left["default"].data *= 10
    outputs = []
    for turn in (0, 1):
        draw(model, probability, 5, 2, turn)
        outputs.append(model(**inputs))
    p, q = (o.logits.double().log_softmax(-1)[inputs["attention_mask"].bool()] for o in outputs)
    if consistency == "kl":
        distance = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    else:
        one, other = (o.logits.double()[inputs["attention_mask"].bool()] for o in outputs)
        distance = 2 * (one - other).square().mean()
    assert distance > 0.01
    expected = (outputs[0].loss + outputs[1].loss).double() / 2 + 0.35 * distance
    draw(model, probability, 5, 2)
    loss, given = trainer.compute_loss(model, inputs, return_outputs=True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(given.logits, outputs[0].logits)
    drawn = [layer.drawn for layer in two_branch_layers(model).values()]
    assert drawn == draws(len(drawn), probability, 5, 2), "the step's own draw stands again"
    assert "forward" not in vars(model)
    # Both passes are in the graph.
    loss.backward()
    for name, layer in two_branch_layers(model).items():
        index = list(two_branch_layers(model)).index(name)
        branches = {draws(6, probability, 5, 2, turn)[index] for turn in (0, 1)}
        assert (layer.mixed_rank_full["default"].grad is not None) == (True in branches)
        assert (layer.mixed_rank_left["default"].grad is not None) == (False in branches)


def test_where_both_draws_agree_the_loss_is_the_ordinary_one(tmp_path):
    trainer = make(tmp_path)
    trainer.state = TrainerState(max_steps=STEPS, global_step=7)
    model, inputs = trainer.model.train(), batch_of(12, 12)
    draw(model, 0.0, 5, 7)
    torch.testing.assert_close(trainer.compute_loss(model, inputs), model(**inputs).loss)


def test_label_smoothing_and_custom_losses_see_both_passes(tmp_path):
    trainer = make(tmp_path, consistency=1e-9, label_smoothing_factor=0.2)
    trainer.state = TrainerState(max_steps=STEPS, global_step=2)
    model, inputs = trainer.model.train(), batch_of(12, 7)
    expected = []
    for turn in (0, 1):
        draw(model, 0.6, 5, 2, turn)
        outputs = model(**{name: t for name, t in inputs.items() if name != "labels"})
        expected.append(trainer.label_smoother(outputs, inputs["labels"], shift_labels=True))
    draw(model, 0.6, 5, 2)
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), sum(expected) / 2)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs["logits"].mean()
    assert torch.isfinite(trainer.compute_loss(model, dict(inputs)))


def test_without_a_weight_it_is_the_plain_trainer(tmp_path):
    one = make(tmp_path / "one", 0.0)
    other = make(tmp_path / "other", 0.0)
    plain = Trainer(other.model, other.args, train_dataset=examples(), callbacks=[MixedRankCallback(0.9, 0.5, 6, 5)])
    one.train()
    plain.train()
    assert_same(one.model.state_dict(), plain.model.state_dict())


def test_evaluation_is_one_pass_of_the_factors(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    expected = trainer.model.merge_and_unload().eval()
    with torch.no_grad():
        expected = expected(**batch_of(12, 12, 12, 12)).loss
    trainer = make(tmp_path)
    trainer.train()
    found = trainer.evaluate(examples(4))["eval_loss"]
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    one = make(tmp_path / "one", steps=2, anneal_steps=2, per_device_train_batch_size=8)
    other = make(tmp_path / "other", steps=2, anneal_steps=2, gradient_accumulation_steps=2)
    one.train()
    other.train()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_weights_injected_by_transformers_are_trained_too(tmp_path):
    model, _ = tiny_model("llama")
    model.add_adapter(MixedRankConfig(target_modules=["q_proj"]))
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", dataloader_pin_memory=False
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    MixedRankTrainer(model, arguments, train_dataset=examples()).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".mixed_rank_" in name for name in changed)


@pytest.mark.parametrize("base", ["dense", "factorized"])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(base, tmp_path):
    whole = run(tmp_path / "whole", accumulate=2, base=base)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", kill=5, accumulate=2, base=base)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "state_0.pt").exists()
    resumed = run(tmp_path / "killed", resume="resume", accumulate=2, base=base)
    assert resumed.returncode == 0, resumed.stderr
    states = [torch.load(tmp_path / name / "state_0.pt") for name in ("whole", "killed")]
    assert_same(*states)
    fresh = make(tmp_path / "fresh", base=base).model.state_dict()
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in states[0].items() if "_full" in name)


def test_resuming_restores_the_callback_where_trainer_is_asked_to(tmp_path):
    first = make(tmp_path, save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=True)
    first.train()
    second = make(tmp_path, anneal_steps=2, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second._mixed_rank_callback().anneal_steps == 6
    assert_same(first.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_two_processes_end_in_the_same_weights(tmp_path, consistency):
    done = run(tmp_path / "two", consistency=consistency, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [torch.load(tmp_path / "two" / f"state_{rank}.pt") for rank in (0, 1)]
    assert_same(*states)
    # Batches of both together are those of one process with twice the micro-batches.
    alone = make(tmp_path / "one", consistency, per_device_train_batch_size=8)
    alone.train()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(tensor, states[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"probability": 1.1}, r"`probability`=1.1 must be a number in \[0, 1\]"),
        ({"probability": True}, "`probability`=True"),
        ({"anneal_fraction": 0}, r"`anneal_fraction`=0 must be a number in \(0, 1\]"),
        ({"anneal_steps": 0}, "`anneal_steps`=0 must be an integer of at least 1"),
        ({"seed": -1}, "`seed`=-1 must be an integer of at least 0"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        MixedRankCallback(**options)


def test_the_trainers_options_are_checked(tmp_path):
    for options, match in (
        ({"consistency_weight": -1}, "`consistency_weight`=-1"),
        ({"consistency": "cosine"}, "`consistency`='cosine' must be one of \\['kl', 'mse'\\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            MixedRankTrainer(tiny_model("llama")[0], **options)


def begin(callback, model, fp16=False, deepspeed=None, max_steps=10, **processes):
    alone = {"world_size": 1, "ddp_find_unused_parameters": None, "activation_checkpointing": False}
    arguments = SimpleNamespace(fp16=fp16, deepspeed_plugin=deepspeed, **(alone | processes))
    callback.on_train_begin(arguments, TrainerState(max_steps=max_steps), None, model=model)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    model = make(tmp_path).model
    begin(MixedRankCallback(anneal_steps=10), model)
    with pytest.raises(ConfigError, match="`anneal_steps`=11 exceeds the 10 steps"):
        begin(MixedRankCallback(anneal_steps=11), model)
    with pytest.raises(ConfigError, match="`fp16`=True.*use `bf16`=True"):
        begin(MixedRankCallback(), model, fp16=True)
    with pytest.raises(ConfigError, match="DeepSpeed steps on flattened gradients.*use DistributedDataParallel"):
        begin(MixedRankCallback(), model, deepspeed=object())
    begin(MixedRankCallback(), model, world_size=2)
    for unused in ({"ddp_find_unused_parameters": False}, {"activation_checkpointing": True}):
        with pytest.raises(ConfigError, match="wait for gradients of the branches that are not drawn"):
            begin(MixedRankCallback(), model, world_size=2, **unused)
    with pytest.raises(TargetError, match="no mixed-rank layer in this LlamaForCausalLM"):
        begin(MixedRankCallback(), tiny_model("llama")[0])
    next(model.parameters()).ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split base_model.*embed_tokens"):
        begin(MixedRankCallback(), model)
    # By a real Trainer, too: nothing has moved.
    trainer = make(tmp_path, anneal_steps=STEPS + 1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError, match="`anneal_steps`=9 exceeds the 8 steps"):
        trainer.train()
    assert_same(trainer.model.state_dict(), before)


def test_activation_checkpointing_goes_with_one_pass_only(tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    with pytest.raises(ConfigError, match="recomputes the first of two passes.*consistency_weight=0"):
        make(tmp_path, **options).train()
    checkpointed, plain = make(tmp_path, 0.0, **options), make(tmp_path, 0.0)
    checkpointed.train()
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_several_devices_in_one_process_are_refused(tmp_path):
    trainer = make(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="One process drives 2 GPUs.*torchrun"):
        trainer.train()


def test_divergence_of_single_numbers_is_refused(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match="one number; use 'mse'"):
        trainer._distance(torch.zeros(4, 1), torch.ones(4, 1), None)


def test_a_trainer_without_a_callback_gets_one(tmp_path):
    model = peft.get_peft_model(tiny_model("llama")[0], MixedRankConfig(target_modules=["q_proj"]))
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    trainer = MixedRankTrainer(model, arguments)
    assert trainer._mixed_rank_callback().state() == MixedRankCallback().state()
