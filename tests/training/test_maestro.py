"""Ordered dropout over ranks with a real Trainer: what it finds, that it happens, and what it leaves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from rank_training_worker import make
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_lowrank import ConfigError, LowRankConfig, LowRankLinear, RankError, TargetError, factorize
from hf_lowrank.refine.distillation import logit_loss
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import MaestroCallback, MaestroTrainer, keep_leading, maestro_ranks
from hf_lowrank.training._components import component_layers, importance, live_rank, tails


class Regression(nn.Module):
    """One factorized map, from rows of a matrix to what another map makes of them."""

    def __init__(self, target):
        super().__init__()
        rows, columns = target.shape
        self.layer = LowRankLinear(columns, rows, min(rows, columns), bias=False)
        self.register_buffer("target", target)

    def forward(self, x):
        difference = self.layer(x) - x @ self.target.T
        # The mean over samples of the squared error of one.
        return {"loss": difference.square().sum(-1).mean(), "logits": difference}


def trained(target, inputs, folder, callbacks):
    torch.manual_seed(3)
    model = Regression(target)
    arguments = TrainingArguments(
        str(folder), max_steps=500, per_device_train_batch_size=len(inputs), learning_rate=0.03, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
        remove_unused_columns=False, lr_scheduler_type="cosine", seed=0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"x": x} for x in inputs], callbacks=callbacks).train()
    return model.layer


def best(target, inputs, rank):
    """The map of that rank with the least error on `inputs`, whose Gram matrix has full rank."""
    root = torch.linalg.cholesky(inputs.T @ inputs)
    u, s, v = torch.linalg.svd(target @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)


def orthogonal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


LINEAR = orthogonal(6, 0)[:, :5] @ torch.diag(torch.tensor([4.0, 2.5, 1.5, 0.8, 0.4])) @ orthogonal(5, 1)
ROUND, LONG = 5**0.5 * torch.eye(5), 2 * torch.diag(torch.tensor([3.0, 2.0, 1.2, 0.7, 0.4])) @ orthogonal(5, 2)


@pytest.mark.parametrize(("target", "inputs"), [(LINEAR, ROUND), (torch.eye(5), LONG)], ids=["svd", "pca"])
def test_every_prefix_is_the_best_of_its_rank(tmp_path, target, inputs):
    """A linear target gives its truncated SVD; the identity, the principal components of the inputs."""
    layer = trained(target, inputs, tmp_path, [MaestroCallback(threshold=0, final_prune=False)])
    errors = _prefix_errors(layer, target, inputs)
    assert max(errors) < 0.03
    # Without ordered dropout, the whole is right and its parts are not.
    plain = _prefix_errors(trained(target, inputs, tmp_path, []), target, inputs)
    assert plain[-1] < 0.03
    assert min(plain[:3]) > 0.2


def _prefix_errors(layer, target, inputs):
    found = []
    for rank in range(1, layer.rank + 1):
        product = (layer.left.weight[:, :rank] @ layer.right.weight[:rank]).detach()
        wanted = best(target, inputs, rank)
        found.append(float(((product - wanted) @ inputs.T).norm() / (wanted @ inputs.T).norm()))
    return found


class Gradients(TrainerCallback):
    """Notes, of each step, which components of which layers have a gradient, and what each layer is cut to."""

    def __init__(self, callback):
        self.callback, self.steps = callback, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = component_layers(model)
        left = {name: layer.left.weight.grad.any(0).tolist() for name, layer in layers.items()}
        right = {name: layer.right.weight.grad.any(1).tolist() for name, layer in layers.items()}
        self.steps.append((self.callback.drawn(state), left, right))


@pytest.mark.parametrize("sampler", ["single_layer", "independent"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_leading_components_of_the_drawn_layers_are_trained(tmp_path, sampler, accumulate):
    callback = MaestroCallback(sampler, threshold=0, target_modules=["q_proj", "up_proj"])
    watch = Gradients(callback)
    make("maestro", tmp_path, [watch], kind=Trainer, callback=callback, gradient_accumulation_steps=accumulate).train()
    ranks = dict.fromkeys(watch.steps[0][1], 64)
    assert len(ranks) == 4
    seen = set()
    for drawn, left, right in watch.steps:
        assert len(drawn) == (1 if sampler == "single_layer" else 4)
        for name, rank in (ranks | drawn).items():
            assert left[name] == right[name] == [True] * rank + [False] * (64 - rank)
        seen.update(drawn.values())
    assert len(seen) > 4
    assert min(seen) < 32


def test_a_drawn_layer_computes_with_its_leading_components_in_training_only(tmp_path):
    trainer = make("maestro", tmp_path)
    model, callback = trainer.model, trainer.callback_handler.callbacks[-2]
    assert isinstance(callback, MaestroCallback)
    callback._kept = {name: live_rank(layer) for name, layer in component_layers(model).items()}
    state = TrainerState(max_steps=8, num_train_epochs=1, global_step=1)
    callback.draw(model, state)
    ((name, rank),) = callback.drawn(state).items()
    layer = model.get_submodule(name)
    assert 1 <= rank < layer.rank
    x = torch.randn(3, layer.in_features)
    whole = x @ layer.dense_weight().T
    part = x @ (layer.left.weight[:, :rank] @ layer.right.weight[:rank]).T
    torch.testing.assert_close(layer.train()(x), part)
    assert (part - whole).norm() > 0.05 * whole.norm()
    torch.testing.assert_close(layer.eval()(x), whole)


@pytest.mark.parametrize("sampler", ["single_layer", "independent"])
def test_ranks_are_dealt_without_replacement(sampler):
    callback = MaestroCallback(sampler, threshold=0, seed=3)
    callback._kept = {"a": 5, "b": 2, "c": 10}
    states = [TrainerState(max_steps=100, num_train_epochs=1, global_step=step) for step in range(34)]
    drawn = [tuple(sorted(callback.drawn(state).items())) for state in states]
    if sampler == "single_layer":
        pairs = {(name, rank) for name, kept in callback._kept.items() for rank in range(1, kept + 1)}
        for cycle in (drawn[:17], drawn[17:]):
            assert {pair for (pair,) in cycle} == pairs
    else:
        for index, kept in enumerate(callback._kept.values()):
            assert sorted(step[index][1] for step in drawn[:kept]) == list(range(1, kept + 1))


def test_full_rank_is_the_dense_model_and_loads_at_any_time(tmp_path):
    dense, inputs = tiny_model("llama")
    with torch.no_grad():
        expected = dense(**inputs()).logits
    model = make("maestro", tmp_path).model.eval()
    layers = component_layers(model)
    assert len(layers) == 6
    assert all(layer.rank == 64 for layer in layers.values())
    for layer in layers.values():
        torch.testing.assert_close(layer.left.weight.norm(dim=0), layer.right.weight.norm(dim=1))
        assert (importance(layer).diff() <= 0).all()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()).logits, expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)


def test_tails_and_their_gradients():
    layer = LowRankLinear(5, 7, 4, bias=False).double()
    with torch.no_grad():
        layer.left.weight[:, 3] = 0
        layer.right.weight[2:] = 0
    left, right = tails(layer)
    for b in range(4):
        torch.testing.assert_close(left[b], layer.left.weight[:, b:].norm())
        torch.testing.assert_close(right[b], layer.right.weight[b:].norm())
    (left.sum() + right.sum()).backward()
    w = layer.left.weight.detach()
    expected = sum(torch.cat([torch.zeros(7, b).double(), w[:, b:] / w[:, b:].norm()], 1) for b in range(3))
    torch.testing.assert_close(layer.left.weight.grad, expected)
    assert not layer.left.weight.grad[:, 3].any()
    assert not layer.right.weight.grad[2:].any()
    assert torch.isfinite(layer.right.weight.grad).all()


def test_the_loss_of_the_trainer(tmp_path):
    for setup in ("maestro", "full_pass"):
        trainer = make(setup, tmp_path)
        model, callback = trainer.model.train(), trainer.callback_handler.callbacks[-2]
        trainer.state = TrainerState(max_steps=8, num_train_epochs=1, global_step=2)
        callback._kept = {name: layer.rank for name, layer in component_layers(model).items()}
        callback.draw(model, trainer.state)
        inputs = {"input_ids": trainer.train_dataset[0]["input_ids"][None]}
        inputs = {**inputs, "labels": inputs["input_ids"]}
        model.get_output_embeddings().weight.data *= 20
        part = model(**inputs)
        full = model.eval()(**inputs)
        model.train()
        penalty = sum(
            layer.left.weight[:, b:].norm() + layer.right.weight[b:].norm()
            for layer in component_layers(model).values()
            for b in range(layer.rank)
        )
        expected = part.loss if setup == "maestro" else full.loss + logit_loss(part.logits, full.logits.detach())
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        torch.testing.assert_close(loss, expected + 1e-3 * penalty)
        assert (full.loss - part.loss).abs() > 1e-4
        # The other pass has left the draw as it was, for what follows in the step.
        torch.testing.assert_close(model(**inputs).loss, part.loss)
        assert torch.isfinite(outputs["logits"]).all()
        torch.testing.assert_close(trainer.compute_loss(model.eval(), inputs), full.loss)


class Zeros(TrainerCallback):
    """Notes how many components of each layer are not zero, as the weights are when they are saved."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: live_rank(layer) for name, layer in component_layers(model).items()})


def test_what_is_dropped_stays_zero_and_goes_at_the_end(tmp_path):
    watch = Zeros()
    callback = MaestroCallback(threshold=2.0, shrink_every=3, target_modules=["q_proj", "up_proj"])
    trainer = make("maestro", tmp_path, [watch], callback=callback)
    trainer.train()
    for name in watch.steps[0]:
        ranks = [step[name] for step in watch.steps]
        assert ranks[0] == ranks[1] == 64, "nothing goes before the first shrinking"
        assert 1 < ranks[2] == ranks[4] < 64
        assert ranks[5] == ranks[7] <= ranks[2]
        layer = trainer.model.get_submodule(name)
        edge = LowRankLinear.break_even(layer.out_features, layer.in_features)
        if ranks[7] >= edge:
            assert type(layer) is nn.Linear
        else:
            assert layer.rank == ranks[7]
    assert not any(name.startswith("maestro") for name, _ in trainer.model.named_buffers())
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_run_ends_small_and_loads_with_plain_from_pretrained(tmp_path):
    class Before(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.model = copy.deepcopy(model).eval()

    before = Before()
    callback = MaestroCallback(threshold=4.0, shrink_every=3, target_modules=["q_proj", "down_proj"])
    trainer = make("maestro", tmp_path, callback=callback)
    # In front of the callback that cuts.
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.train()
    layers = component_layers(trainer.model)
    assert layers
    assert all(layer.rank < 32 for layer in layers.values())
    inputs = tiny_model("llama")[1]()
    with torch.no_grad():
        now = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(now, before.model(**inputs).logits, rtol=0, atol=1e-5)
        trainer.save_model(tmp_path / "small")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert torch.equal(again(**inputs).logits, now)


@pytest.fixture
def ordered():
    """A factorized model whose layers have a spectrum each."""
    model, inputs = tiny_model("llama")
    for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        module.weight.data *= 1 + index % 4
    pattern = {".*q_proj": 64, ".*up_proj": 64, ".*k_proj": 32}
    config = LowRankConfig(method="svd", rank_pattern=pattern, target_modules=["q_proj", "up_proj", "k_proj"])
    return factorize(model, config), inputs()


def stored(model, layers):
    return sum(model.get_submodule(name).weight.numel() if not isinstance(model.get_submodule(name), LowRankLinear)
               else sum(p.numel() for p in model.get_submodule(name).parameters()) for name in layers)  # fmt: skip


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
def test_one_model_at_many_sizes(ordered, ratio, tmp_path):
    model, inputs = ordered
    layers = component_layers(model)
    dense = sum(layer.out_features * layer.in_features for layer in layers.values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = maestro_ranks(model, ratio)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small = keep_leading(copy.deepcopy(model), ranks)
    assert ratio * dense - 64 * 192 < stored(small, layers) <= ratio * dense
    for name, layer in component_layers(small).items():
        rank = ranks[name]
        whole = layers[name]
        product = whole.left.weight[:, :rank] @ whole.right.weight[:rank]
        torch.testing.assert_close(layer.dense_weight(), product)
    # The least of what is kept matters no less, within its layer, than the most of what goes.
    kept = {name: rank for name, rank in ranks.items() if isinstance(small.get_submodule(name), LowRankLinear)}
    shares = {name: importance(layers[name]) / importance(layers[name])[0] for name in kept}
    gone = max(float(shares[name][rank]) for name, rank in kept.items())
    assert all(float(shares[name][rank - 1]) >= gone * (1 - 1e-6) for name, rank in kept.items() if rank > 1)
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)


def test_the_scale_of_a_weight_decides_nothing(ordered):
    model, _ = ordered
    scaled = copy.deepcopy(model)
    name, layer = next(iter(component_layers(scaled).items()))
    with torch.no_grad():
        layer.left.weight.mul_(2**-10)
    assert maestro_ranks(scaled, 0.4) == maestro_ranks(model, 0.4)
    assert maestro_ranks(scaled, 0.4)[name] > 1


def test_smaller_budgets_are_nested(ordered):
    model, _ = ordered
    found = [maestro_ranks(model, ratio) for ratio in (1.0, 0.8, 0.6, 0.4, 0.2)]
    for more, less in zip(found, found[1:], strict=False):
        assert all(less[name] <= more[name] for name in more)
        assert less != more


def test_all_dense_is_an_ordinary_model(ordered, tmp_path):
    model, inputs = ordered
    with torch.no_grad():
        expected = model(**inputs).logits
        small = keep_leading(model, maestro_ranks(model, 1.0))
        assert not component_layers(small)
        small.save_pretrained(tmp_path)
        assert "quantization_config" not in (tmp_path / "config.json").read_text()
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_bad_ranks_and_ratios_are_refused(ordered):
    model, _ = ordered
    name = next(iter(component_layers(model)))
    for ratio in (0, 1.1, True):
        with pytest.raises(ConfigError, match=r"`param_ratio`=.* must be a number in \(0, 1\]"):
            maestro_ranks(model, ratio)
    with pytest.raises(ConfigError, match="`param_ratio`=0.001 is out of reach"):
        maestro_ranks(model, 0.001)
    with pytest.raises(TargetError, match="has no `low_rank` layer"):
        maestro_ranks(tiny_model("llama")[0], 0.5)
    with pytest.raises(TargetError, match="`ranks` has 'lm_head'"):
        keep_leading(model, {name: 3, "lm_head": 4})
    with pytest.raises(RankError, match=r"must be an integer in 1..64"):
        keep_leading(model, {name: 65})
    assert all(layer.rank >= 32 for layer in component_layers(model).values()), "nothing was cut"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "all"}, "`sampler`='all' of MaestroCallback must be one of"),
        ({"threshold": -1}, "`threshold`=-1 must be a number of at least 0"),
        ({"shrink_every": 0}, "`shrink_every`=0 must be an integer of at least 1"),
        ({"final_prune": 1}, "`final_prune`=1 must be True or False"),
        ({"seed": -1}, "`seed`=-1 must be an integer of at least 0"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        MaestroCallback(**options)


def test_the_trainers_options_are_checked():
    for options in ({"lasso_weight": -1}, {"full_pass": 1}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
            MaestroTrainer(tiny_model("llama")[0], **options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    callback = MaestroCallback(shrink_every=9, target_modules=["q_proj"])
    trainer = make("maestro", tmp_path, callback=callback)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ConfigError, match="`shrink_every`=9 exceeds the 8 steps"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(TargetError, match="matches no linear layer"):
        make("maestro", tmp_path, callback=MaestroCallback(target_modules=["nothing"]))
    next(trainer.model.parameters()).ds_id = 0
    with pytest.raises(TargetError, match="ZeRO-3 has split .* the weights of MaestroCallback need whole weights"):
        trainer.train()
    with pytest.raises(TargetError, match="names experts of a mixture only"):
        make(
            "maestro",
            tmp_path,
            model=tiny_model("mixtral")[0],
            callback=MaestroCallback(target_modules=r".*experts.*"),
        )
    with pytest.raises(ConfigError, match="`fp16`=True"):
        MaestroCallback().on_init_end(SimpleNamespace(fp16=True), None, None, model=tiny_model("llama")[0])
    # Given to Trainer too late, it finds nothing to work on.
    late = make("freezing", tmp_path, callback=TrainerCallback(), model=tiny_model("llama")[0])
    late.model = hf_dense = tiny_model("llama")[0]
    late.model_wrapped = late.callback_handler.model = hf_dense
    late.add_callback(MaestroCallback())
    with pytest.raises(TargetError, match="finds no `low_rank` layer in this LlamaForCausalLM"):
        late.train()


def test_resuming_restores_the_callback_where_trainer_is_asked_to(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    first = make("maestro", tmp_path, **options)
    first.train()
    second = make(
        "maestro", tmp_path, callback=MaestroCallback(target_modules=["q_proj", "up_proj", "down_proj"]), **options
    )
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state = second.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    half = component_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))
    assert all(1 < live_rank(layer) < layer.rank == 64 for layer in half.values()), "masked, and of full rank"


def test_a_second_run_wants_a_new_trainer(tmp_path):
    trainer = make("maestro", tmp_path, callback=MaestroCallback(threshold=2.0, target_modules=["q_proj"]))
    trainer.train()
    with pytest.raises(ConfigError, match="The optimizer was made before .*make a new Trainer"):
        trainer.train()
    again = make("maestro", tmp_path, model=trainer.model, callback=MaestroCallback(threshold=0))
    again.train()


def test_frozen_factors_are_refused(tmp_path):
    trainer = make("maestro", tmp_path)
    name, layer = next(iter(component_layers(trainer.model).items()))
    layer.left.weight.requires_grad_(False)
    with pytest.raises(TargetError, match=f"The factors of {name} are frozen"):
        trainer.train()


def test_a_trainer_without_a_callback_gets_one(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = MaestroTrainer(tiny_model("llama")[0], arguments)
    assert sum(isinstance(callback, MaestroCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert len(component_layers(trainer.model)) == 14


def test_two_passes_refuse_checkpointing(tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    with pytest.raises(ConfigError, match="recomputes the first of two passes.*full_pass=False"):
        make("full_pass", tmp_path, **options).train()
