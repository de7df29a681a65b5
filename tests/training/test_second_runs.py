"""A model that has met a callback before, callbacks that come late or twice, and data without a length."""

from types import SimpleNamespace

import pytest
import torch
from callback_worker import examples, make
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_lowrank import ConfigError, LowRankConfig, TargetError, factorize
from hf_lowrank.formats import FormatLinear
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import (
    BasisSelectionCallback,
    FirstOrderPruningCallback,
    MaestroCallback,
    SequentialFreezingCallback,
    StraightThroughFactorizerCallback,
    TrainedRankPruningCallback,
)


def pruning(**options):
    return FirstOrderPruningCallback(keep_fraction=0.3, **options)


def trp(**options):
    return TrainedRankPruningCallback(param_ratio=0.5, period=2, **options)


def straight_through(**options):
    return StraightThroughFactorizerCallback(LowRankConfig("svd", 0.5, **options), refresh_every=2)


def basis(**options):
    return BasisSelectionCallback(extra_rank=2, pruning_steps=2, rank_multiple=1, **options)


def zeros(model):
    """Targets by their last name that have lost most of their weights."""
    weights = {name: p for name, p in model.named_parameters() if "proj" in name}
    return {name.split(".")[-2] for name, p in weights.items() if (p == 0).float().mean() > 0.5}


def factorized(model):
    return {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, FormatLinear)}


@pytest.mark.parametrize(
    ("callback", "changed"),
    [(pruning, zeros), (trp, factorized)],
)
def test_arguments_of_the_later_callback_count(callback, changed, tmp_path):
    """Of the first one nothing ran: it was refused, or its Trainer never trained."""
    trainer = make(tmp_path, callback(target_modules=["q_proj"]))
    make(tmp_path, callback(target_modules=["up_proj"]), model=trainer.model).train()
    assert changed(trainer.model) == {"up_proj"}
    assert not [name for name, _ in trainer.model.named_buffers() if "pruning" in name]


def test_a_score_that_needs_more_than_the_one_before(tmp_path):
    model = make(tmp_path, pruning(score="magnitude")).model
    make(tmp_path, pruning(score="movement"), model=model).train()
    assert len(zeros(model)) == 7


@pytest.mark.parametrize("callback", [pruning, trp])
def test_targets_of_the_later_callback_are_checked(callback, tmp_path):
    model = make(tmp_path, callback()).model
    with pytest.raises(TargetError, match="'nothing' matches no linear layer"):
        make(tmp_path, callback(target_modules=["nothing"]), model=model)


@pytest.mark.parametrize("callback", [straight_through, basis])
def test_layers_that_were_replaced_for_others_are_refused(callback, tmp_path):
    model = make(tmp_path, callback(target_modules=["q_proj"])).model
    with pytest.raises(ConfigError, match="were replaced for a .* with other arguments.*load the model anew"):
        make(tmp_path, callback(target_modules=["up_proj"]), model=model)
    make(tmp_path, callback(target_modules=["q_proj"]), model=model).train()
    assert factorized(model) <= {"q_proj"}


@pytest.mark.parametrize("callback", [pruning, trp, straight_through, basis])
def test_two_in_one_trainer_are_refused(callback, tmp_path):
    with pytest.raises(ConfigError, match="Several .* in one Trainer would share their state"):
        make(tmp_path, callback(target_modules=["q_proj"]), callback(target_modules=["up_proj"]))
    trainer = make(tmp_path, callback(target_modules=["q_proj"]))
    trainer.add_callback(callback(target_modules=["up_proj"]))
    with pytest.raises(ConfigError, match="Several .* in one Trainer"):
        trainer.train()


def late(folder, callback):
    trainer = make(folder)
    trainer.add_callback(callback)
    return trainer


def with_optimizer(folder, callback):
    model = tiny_model("llama")[0]
    optimizers = torch.optim.AdamW(model.parameters()), None
    arguments = make(folder).args
    return Trainer(model, arguments, train_dataset=examples(), callbacks=[callback], optimizers=optimizers)


@pytest.mark.parametrize("trainer", [late, with_optimizer])
def test_an_optimizer_that_is_older_than_the_factors_is_refused(trainer, tmp_path):
    with pytest.raises(ConfigError, match="The optimizer was made before model.layers.0.self_attn.q_proj.factorized"):
        trainer(tmp_path, straight_through()).train()


def test_maestro_takes_a_factorized_model_whole(tmp_path):
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig("svd", 0.6, format="low_rank", target_modules=["q_proj", "up_proj"]))
    for options in ({"target_modules": ["nothing_like_this"]}, {"exclude_modules": ["up_proj"]}):
        with pytest.raises(TargetError, match="is `low_rank` already, which MaestroCallback takes as it is"):
            make(tmp_path, MaestroCallback(**options), model=model)
    make(tmp_path, MaestroCallback(target_modules=["q_proj", "up_proj"]), model=model).train()


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from examples(8)


def on_a_stream(folder, callback, model):
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    return Trainer(model, arguments, train_dataset=Stream(), callbacks=[callback])


def test_epochs_of_data_without_a_length(tmp_path):
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig("svd", 0.6, format="low_rank"))
    for callback, name in ((SequentialFreezingCallback, "period"), (MaestroCallback, "shrink_every")):
        with pytest.raises(ConfigError, match=f"`{name}`=None .* without a length has no epochs"):
            on_a_stream(tmp_path, callback(), model).train()
        on_a_stream(tmp_path, callback(**{name: 3}), model).train()


@pytest.mark.parametrize(
    "run", [{"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": -1, "num_train_epochs": 0.5}]
)
@pytest.mark.parametrize(("accumulate", "expected"), [(1, 8), (3, 3)])
def test_maestro_shrinks_once_an_epoch(run, accumulate, expected, tmp_path):
    """32 rows in batches of 4, whatever part of an epoch the run has."""
    callback = MaestroCallback(target_modules=["q_proj"])
    make(tmp_path, callback, gradient_accumulation_steps=accumulate, **run).train()
    assert callback._period == expected


@pytest.mark.parametrize("resumed", ["plain", "restored", "from_pretrained"])
def test_basis_selection_leaves_what_was_trained_trainable(resumed, tmp_path):
    model, _ = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    options = {"save_strategy": "steps", "save_steps": 4}
    make(tmp_path, basis(), model=model, **options).train()
    again, _ = tiny_model("llama")
    again.lm_head.requires_grad_(False)
    if resumed == "from_pretrained":
        again = type(again).from_pretrained(tmp_path / "checkpoint-4")
    restore = {"restore_callback_states_from_checkpoint": True} if resumed == "restored" else {}
    trainer = make(tmp_path, basis(), model=again, **options, **restore)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}


def test_processes_that_would_wait_are_refused(tmp_path):
    callback = straight_through()
    trainer = make(tmp_path, callback)
    waiting = {"world_size": 2, "ddp_find_unused_parameters": None, "activation_checkpointing": True}
    with pytest.raises(ConfigError, match="wait for gradients of the factors.*`ddp_find_unused_parameters`=True"):
        callback.on_train_begin(SimpleNamespace(**waiting), trainer.state, None, model=trainer.model)
