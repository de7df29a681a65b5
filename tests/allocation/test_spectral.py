import math
from dataclasses import replace

import pytest

from hf_lowrank import ALLOCATORS, ConfigError, LowRankConfig, factorize, summary
from hf_lowrank.allocation import cost_of
from hf_lowrank.testing import check_allocator, tiny_model
from hf_lowrank.testing.allocators import make_candidates


def with_spectrum(candidate, values):
    squares = [value**2 for value in values]
    return replace(
        candidate, curve=[math.fsum(squares[r:]) for r in range(1, len(squares) + 1)], total=math.fsum(squares)
    )


def test_the_other_rule_keeps_the_laws_too():
    check_allocator(ALLOCATORS["spectral"](rule="pooled"))


@pytest.mark.parametrize("rule", ["effective_rank", "pooled"])
def test_size_of_the_weight_does_not_count(rule):
    """Unlike errors, shapes of spectra are the same for a weight and a thousand times that weight."""
    values = [0.9**i for i in range(64)]
    candidates = make_candidates([(64, 64)] * 3)
    spectra = [
        with_spectrum(c, [scale * v for v in values]) for c, scale in zip(candidates, (1, 1e3, 1e-3), strict=True)
    ]
    ranks = ALLOCATORS["spectral"](rule=rule).allocate(spectra, 0.5 * 3 * 64 * 64)
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_ranks_go_with_the_root_of_the_effective_rank_over_the_cost():
    """k equal singular values have effective rank k."""
    narrow, wide = make_candidates([(256, 256), (256, 768)])
    flat = [with_spectrum(narrow, [1.0] * 16 + [0.0] * 240), with_spectrum(wide, [1.0] * 144 + [0.0] * 112)]
    budget = 0.3 * (256 * 256 + 256 * 768)
    ranks = ALLOCATORS["spectral"](least=0).allocate(flat, budget)
    expected = math.sqrt(16 / 512) / math.sqrt(144 / 1024)
    assert ranks[narrow.name] / ranks[wide.name] == pytest.approx(expected, rel=0.03)
    # The ranks that minimize the sum of effective ranks over ranks: none nearby is better.
    best = 16 / ranks[narrow.name] + 144 / ranks[wide.name]
    for shift in range(-8, 9):
        moved = {narrow.name: ranks[narrow.name] + 2 * shift, wide.name: ranks[wide.name] - shift}
        assert cost_of(flat, moved) == cost_of(flat, ranks)
        assert 16 / moved[narrow.name] + 144 / moved[wide.name] >= 0.999 * best


def test_pooling_keeps_the_largest_of_all():
    first, second = make_candidates([(64, 64), (64, 64)])
    spectra = [with_spectrum(first, [0.7**i for i in range(64)]), with_spectrum(second, [0.95**i for i in range(64)])]
    ranks = ALLOCATORS["spectral"](rule="pooled", least=0).allocate(spectra, 0.4 * 2 * 64 * 64)
    shares = []
    for candidate, base in zip(spectra, (0.7, 0.95), strict=True):
        norm, rank = math.sqrt(candidate.total), ranks[candidate.name]
        shares.append((base ** (rank - 1) / norm, base**rank / norm))
    kept, dropped = min(k for k, _ in shares), max(d for _, d in shares)
    # What rounding left has raised a weight by a step.
    assert dropped <= kept / 0.95


def test_no_weight_falls_below_its_part_of_uniform():
    first, second = make_candidates([(64, 64), (64, 64)])
    spectra = [with_spectrum(first, [1.0] + [0.0] * 63), with_spectrum(second, [1.0] * 64)]
    budget = 0.5 * 2 * 64 * 64
    uniform = ALLOCATORS["uniform"]().allocate(spectra, budget)
    free = ALLOCATORS["spectral"](least=0).allocate(spectra, budget)
    bound = ALLOCATORS["spectral"](least=0.9).allocate(spectra, budget)
    assert free[first.name] < bound[first.name]
    assert bound[first.name] >= int(0.9 * uniform[first.name])


def test_a_weight_that_never_reaches_break_even_keeps_all_it_has():
    low, full = make_candidates([(64, 64), (64, 64)])
    spectra = [with_spectrum(low, [1.0] * 6 + [0.0] * 58), with_spectrum(full, [0.9**i for i in range(64)])]
    budget = 0.9 * 2 * 64 * 64
    ranks = ALLOCATORS["spectral"](rule="pooled", least=0).allocate(spectra, budget)
    assert ranks[low.name] >= 6
    assert ranks[full.name] is None
    assert cost_of(spectra, ranks) <= budget


def test_a_zero_weight_takes_the_least():
    first, second = make_candidates([(64, 64), (64, 64)])
    spectra = [with_spectrum(first, [0.0] * 64), with_spectrum(second, [0.9**i for i in range(64)])]
    for rule in ("effective_rank", "pooled"):
        ranks = ALLOCATORS["spectral"](rule=rule, least=0).allocate(spectra, 0.3 * 2 * 64 * 64)
        assert ranks[first.name] < ranks[second.name]


def test_on_a_model():
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig(method="svd", allocation="spectral", param_ratio=0.5, rank_multiple=1))
    rows = summary(model).rows
    assert len({row.rank for row in rows}) > 1
    assert sum(row.parameters for row in rows) <= 0.5 * sum(row.dense_parameters for row in rows)


@pytest.mark.parametrize(("option", "value"), [("rule", "entropy"), ("least", 1.5), ("least", -0.1)])
def test_options_are_checked(option, value):
    with pytest.raises(ConfigError, match=f"`{option}`={value!r} of spectral"):
        ALLOCATORS["spectral"](**{option: value})
