"""Dimension squeezing with a real Trainer: the least gap goes, nothing comes back, the end is an ordinary train."""

import pytest
import torch
from callback_worker import make as plain
from rank_training_worker import make
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_lowrank import ConfigError, LowRankConfig, TargetError, TensorTrainLinear, factorize, summary
from hf_lowrank.linalg import train_matrix
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import DimensionSqueezingCallback
from hf_lowrank.training.dimension_squeezing import live_bonds


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorTrainLinear)}


class Watch(TrainerCallback):
    """Notes what is left of the bonds before each step."""

    def __init__(self):
        self.bonds = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.bonds.append({name: live_bonds(layer) for name, layer in layers_of(model).items()})


def run(folder, watch=None, trainer=None, **options):
    watch = watch or Watch()
    callback = DimensionSqueezingCallback(**{"max_gap": 0.5, "period": 2, **options})
    made = make("squeezing", folder, [watch], callback=callback, **(trainer or {}))
    made.train()
    return made, watch


def test_a_bond_goes_at_every_event_and_does_not_come_back(tmp_path):
    trainer, watch = run(tmp_path, step=2, trainer={"weight_decay": 0.1})
    counts = [sum(map(sum, bonds.values())) for bonds in watch.bonds]
    # Before the steps 1 to 8, with events after 2, 4, 6 and 8.
    first = counts[0]
    assert counts == [first, first, first - 2, first - 2, first - 4, first - 4, first - 6, first - 6]
    final = {name: list(layer.bonds) for name, layer in layers_of(trainer.model).items()}
    assert sum(map(sum, final.values())) == first - 8
    trainer.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = tiny_model("llama")[1]()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, trainer.model(**inputs).logits)
    assert str(summary(again)) == str(summary(trainer.model))
    assert not [name for name in trainer.model.state_dict() if "squeezing" in name]


def chain(seed=0):
    """A layer whose bonds carry singular values of very different sizes."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, dtype=torch.float64))
    factorize(model, LowRankConfig(method={"name": "tensor_train", "cores": 3}, rank_pattern={"0": 14}))
    return model, model[0]


def unfolded(layer, bond):
    shape = [size for pair in zip(layer.out_shape, layer.in_shape, strict=True) for size in pair]
    whole = train_matrix(layer.cores).detach().view(*layer.out_shape, *layer.in_shape)
    count = len(layer.out_shape)
    whole = whole.permute([axis for k in range(count) for axis in (k, count + k)]).reshape(shape)
    return torch.linalg.svdvals(whole.flatten(0, 2 * bond + 1).flatten(1))


def test_the_least_gap_is_the_one_of_the_unfolded_weight_and_is_what_is_lost():
    model, layer = chain()
    before = live_bonds(layer)
    gaps = []
    for bond, size in enumerate(before):
        values = unfolded(layer, bond)
        gaps.append(float(values[size - 3 :].norm() / values.norm()))
    weight = train_matrix(layer.cores).detach()
    DimensionSqueezingCallback(max_gap=1.0, step=3)._squeeze(model)
    least = gaps.index(min(gaps))
    assert live_bonds(layer) == [size - 3 * (bond == least) for bond, size in enumerate(before)]
    lost = float((train_matrix(layer.cores).detach() - weight).norm() / weight.norm())
    assert lost == pytest.approx(min(gaps), rel=1e-6)


def test_no_gap_above_the_bound_is_made():
    model, layer = chain()
    callback = DimensionSqueezingCallback(max_gap=0.25)
    lowered = []
    for _ in range(30):
        weight, bonds = train_matrix(layer.cores).detach(), live_bonds(layer)
        callback._squeeze(model)
        lost = (train_matrix(layer.cores).detach() - weight).norm() / weight.norm()
        assert lost <= 0.25
        lowered.append(live_bonds(layer) != bonds)
    assert lowered[0]
    assert not lowered[-1], "the bound has been reached"
    assert max(live_bonds(layer)) > 1


def test_bonds_that_neighbours_need_stay():
    """Of the modes of two cores, one is full: lowering it would leave a core that cannot be filled."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, dtype=torch.float64))
    method = {"name": "tensor_train", "out_shape": [4, 2, 2], "in_shape": [4, 2, 2]}
    factorize(model, LowRankConfig(method=method, rank_pattern={"0": 16}))
    assert model[0].bonds == (16, 4)
    callback = DimensionSqueezingCallback(max_gap=1.0, step=2)
    for _ in range(20):
        callback._squeeze(model)
        first, second = live_bonds(model[0])
        assert first <= 4 * second
    assert live_bonds(model[0])[1] <= 2


def test_an_optimizer_step_walks_the_modules_once(monkeypatch):
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig(method="tensor_train", param_ratio=0.5, allocation="uniform"))
    callback = DimensionSqueezingCallback()
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert len(callback._live) > 2
    walks, real = [], model.named_modules
    monkeypatch.setattr(model, "named_modules", lambda *args, **kwargs: walks.append(1) or real(*args, **kwargs))
    callback.on_optimizer_step(None, None, None, model=model)
    assert walks == [1]


def test_a_layer_that_is_not_smaller_becomes_dense(tmp_path):
    model = tiny_model("llama")[0]
    pattern = {"q_proj": 64, "up_proj": 8}
    factorize(model, LowRankConfig(method="tensor_train", rank_pattern=pattern, target_modules=list(pattern)))
    trainer = make("squeezing", tmp_path, callback=DimensionSqueezingCallback(max_gap=0.0, period=4), model=model)
    trainer.train()
    assert all(name.endswith("up_proj") for name in layers_of(trainer.model))
    assert type(trainer.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_gap": 1.5}, r"`max_gap`=1.5 must be a number in \[0, 1\]"),
        ({"period": 0}, "`period`=0 must be an integer of at least 1"),
        ({"step": 0}, "`step`=0"),
        ({"squeezes": True}, "`squeezes`=True"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        DimensionSqueezingCallback(**options)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="`period`=9 is longer than the run of 8 optimizer steps"):
        run(tmp_path, period=9)
    with pytest.raises(TargetError, match="finds no `tensor_train` layer"):
        plain(tmp_path, DimensionSqueezingCallback())
