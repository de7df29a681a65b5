from dataclasses import replace

import pytest

from hf_lowrank import ALLOCATORS, ConfigError
from hf_lowrank.testing import SyntheticProbe
from hf_lowrank.testing.allocators import make_candidates


def test_errors_in_arbitrary_units_are_put_into_the_probes():
    """The knapsack of the true divergences is found, whatever unit each curve comes in."""
    true = make_candidates([(64, 64), (48, 96), (96, 48), (64, 64)], 8)
    sensitivities = {"layer.0": 5.0, "layer.1": 0.1, "layer.2": 1.0, "layer.3": 0.02}
    scaled = [replace(c, curve=[sensitivities[c.name] * error for error in c.curve]) for c in true]
    units = dict(zip(sensitivities, (1e-3, 40.0, 1.0, 7e5), strict=True))
    misleading = [replace(c, curve=[units[c.name] * error for error in c.curve]) for c in true]
    for ratio in (0.4, 0.6, 0.8):
        budget = ratio * sum(c.dense_cost for c in true)
        probe = SyntheticProbe(true, sensitivities)
        ranks = ALLOCATORS["lems"]().allocate(misleading, budget, probe)
        assert ranks == ALLOCATORS["knapsack"]().allocate(scaled, budget)
        assert ranks != ALLOCATORS["knapsack"]().allocate(misleading, budget)


def test_one_probe_a_weight_with_a_tenth_removed():
    candidates = make_candidates([(64, 64), (48, 96)])
    probe = SyntheticProbe(candidates)
    ALLOCATORS["lems"]().allocate(candidates, 5000, probe)
    assert [list(asked) for asked in probe.asked] == [["layer.0"], ["layer.1"]]
    for candidate, asked in zip(candidates, probe.asked, strict=True):
        (rank,) = asked.values()
        assert candidate.cost(rank) <= 0.9 * candidate.dense_cost < candidate.cost(rank + 1)


def test_depth_moves_the_budget_to_the_end():
    candidates = make_candidates([(64, 64)] * 4)
    probe = SyntheticProbe(candidates)
    ranks = ALLOCATORS["lems"](depth_gamma=3.0).allocate(candidates, 0.5 * 4 * 4096, probe)
    assert ranks["layer.0"] < ranks["layer.3"]


@pytest.mark.parametrize("rounding", [0.0, 1e-14])
def test_a_weight_of_low_rank_is_probed_below_its_rank(rounding):
    """Curves that end in zeros, or in what rounding makes of them, say nothing at the usual probe rank."""
    low, other = make_candidates([(64, 64), (64, 64)])
    low = replace(low, curve=[max(5.0 - rank, rounding) for rank in range(1, 65)])
    probe = SyntheticProbe([low, other])
    ranks = ALLOCATORS["lems"]().allocate([low, other], 0.6 * 2 * 4096, probe)
    assert probe.asked[0] == {low.name: 4}
    assert ranks[low.name] == 5


class RoundingProbe(SyntheticProbe):
    """Of what float32 logits do not resolve, nothing is seen."""

    def divergence(self, ranks):
        divergence = super().divergence(ranks)
        return divergence if divergence > 1e-7 else 0.0


def test_what_is_too_small_to_measure_is_probed_at_lower_ranks():
    steep, other = make_candidates([(64, 64), (64, 64)])
    steep = replace(steep, curve=[128 * 0.45**rank for rank in range(1, 65)])
    budget = 0.5 * 2 * 4096
    probe = RoundingProbe([steep, other])
    ranks = ALLOCATORS["lems"]().allocate([steep, other], budget, probe)
    assert [asked.get(steep.name) for asked in probe.asked] == [28, 14, None]
    assert ranks == ALLOCATORS["knapsack"]().allocate([steep, other], budget)


def test_a_weight_that_no_output_depends_on_takes_the_least():
    idle, other = make_candidates([(64, 64), (64, 64)])
    probe = RoundingProbe([idle, other], {idle.name: 0.0})
    ranks = ALLOCATORS["lems"]().allocate([idle, other], 0.5 * 2 * 4096, probe)
    assert [asked[idle.name] for asked in probe.asked[:-1]] == [28, 14, 7, 3, 1]
    assert ranks[idle.name] == 1


@pytest.mark.parametrize(
    "options", [{"probe_ratio": 0}, {"probe_ratio": 1}, {"search_samples": 0}, {"depth_gamma": -1.0}]
)
def test_refused(options):
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}`="):
        ALLOCATORS["lems"](**options)
