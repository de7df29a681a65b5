import sys
from dataclasses import replace

import optuna
import pytest

from hf_lowrank import ALLOCATORS, ConfigError, MissingPackageError
from hf_lowrank.allocation import cost_of
from hf_lowrank.testing import SyntheticProbe
from hf_lowrank.testing.allocators import make_candidates


TYPES = {"query": 0.001, "value": 1.0, "up": 0.1}


@pytest.fixture
def candidates():
    names = [f"layers.{i}.{name}" for i in range(3) for name in TYPES]
    return [replace(c, name=name) for c, name in zip(make_candidates([(64, 64)] * len(names)), names, strict=True)]


def probe_of(candidates, seed=0):
    return SyntheticProbe(candidates, {c.name: TYPES[c.name.rpartition(".")[2]] for c in candidates}, seed)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_finds_which_types_matter_and_meets_the_budget(candidates, sampler):
    budget = 0.6 * sum(c.dense_cost for c in candidates)
    bayes = ALLOCATORS["bayes"](n_trials=25, sampler=sampler)
    ranks = bayes.allocate(candidates, budget, probe_of(candidates))
    assert 0.97 * budget <= cost_of(candidates, ranks) <= budget
    by_type = {name: {ranks[c.name] for c in candidates if c.name.endswith(name)} for name in TYPES}
    assert all(len(found) == 1 for found in by_type.values()), "one ratio a type"
    low, high = by_type["query"].pop(), by_type["value"].pop()
    assert high is None or low < high
    uniform = ALLOCATORS["uniform"]().allocate(candidates, budget)

    def divergence(some):
        return probe_of(candidates).divergence({name: rank for name, rank in some.items() if rank is not None})

    assert divergence(ranks) < 0.5 * divergence(uniform)
    assert ranks == bayes.allocate(candidates, budget, probe_of(candidates)), "same seed, same ranks"


def test_every_trial_fits_and_a_single_one_is_uniform(candidates):
    budget = 0.5 * sum(c.dense_cost for c in candidates)
    probe = probe_of(candidates)
    ALLOCATORS["bayes"](n_trials=12).allocate(candidates, budget, probe)
    assert len(probe.asked) > 5
    for asked in probe.asked:
        assert cost_of(candidates, {c.name: asked.get(c.name) for c in candidates}) <= budget
    once = ALLOCATORS["bayes"](n_trials=1).allocate(candidates, budget, probe)
    assert once == ALLOCATORS["uniform"]().allocate(candidates, budget)


def test_the_first_guess_is_tried(candidates):
    budget = 0.6 * sum(c.dense_cost for c in candidates)
    probe = probe_of(candidates)
    guess = {"query": 0.2, "value": 1.0, "up": 0.6}
    ranks = ALLOCATORS["bayes"](n_trials=2, initial=guess).allocate(candidates, budget, probe)
    kept = {name: candidates[0].cost(ranks[f"layers.0.{name}"]) / 4096 for name in ("query", "up")}
    assert kept["up"] / kept["query"] == pytest.approx(3, rel=0.1)
    with pytest.raises(ConfigError, match=r"names \['gate'\], but the types of the weights are \['query', 'up'"):
        ALLOCATORS["bayes"](initial={"gate": 0.5}).allocate(candidates, budget, probe)


def test_divergence_alone_asks_for_no_loss(candidates):
    probe = probe_of(candidates)
    probe.loss = None
    ALLOCATORS["bayes"](n_trials=3, objective="kl").allocate(candidates, 20_000, probe)


def test_optunas_verbosity_is_left_as_it_was(candidates):
    before = optuna.logging.get_verbosity()
    ALLOCATORS["bayes"](n_trials=1).allocate(candidates, 20_000, probe_of(candidates))
    assert optuna.logging.get_verbosity() == before


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match="needs optuna: `pip install"):
        ALLOCATORS["bayes"]()


@pytest.mark.parametrize(
    "options",
    [
        {"n_trials": 0},
        {"search_samples": 1.5},
        {"objective": "loss"},
        {"sampler": "grid"},
        {"kl_weight": -1},
        {"least_ratio": 1},
        {"initial": {"query": 1.5}},
    ],
)
def test_refused(options):
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}"):
        ALLOCATORS["bayes"](**options)
