import math
from dataclasses import dataclass

from ..checks import check_choice, check_number
from .base import Allocator, register_allocator
from .rounding import cost_of, fill, round_down, uniform_ranks


RULES = ("effective_rank", "pooled")


@register_allocator("spectral")
@dataclass(frozen=True)
class Spectral(Allocator):
    r"""Ranks from the shape of each spectrum, whatever its size.

        effective_rank:    r_l = t sqrt(R_l / (out_l + in_l)),    R_l = exp(-sum_i p_i log p_i),  p_i = s_i / sum_j s_j
        pooled:            r_l = number of i with s_i / sqrt(sum_j s_j^2) >= 1 / t

    `s` are the square roots of what each rank takes off the squared error in the method's own metric: for `svd`, the
    singular values. `t` is as high as the budget allows, and what rounding leaves is spent on the weights in their
    order. The first is what minimizes `sum_l R_l / r_l` within a budget of two-factor parameters. A weight whose rank
    would reach break-even stays dense. Nothing in it says what an error does to the loss: `knapsack` does.

    Args:
        rule (`str`, defaults to `"effective_rank"`): or `"pooled"`.
        least (`float`, defaults to 0.5): no weight keeps less than this part of what `uniform` would keep, in [0, 1].

    Raises:
        ConfigError: an option that is not allowed.

    Reference:
        `effective_rank`: D-Rank (2025), from memory; its shift from queries and keys to values is left to `lorap`.
        `pooled`: COMPOT, 2602.15200, from a summary, where spectra are those of the weights as they are; the bound
        from below is reconstructed.
    """

    needs_curves = True

    rule: str = "effective_rank"
    least: float = 0.5

    def __post_init__(self):
        check_choice("rule", self.rule, RULES, self.name)
        check_number("least", self.least, 0, 1, self.name)

    def allocate(self, candidates, budget):
        lowest = uniform_ranks(candidates, self.least * budget)
        wanted = [_by_effective_rank(c) if self.rule == "effective_rank" else _by_pooling(c) for c in candidates]

        def ranks(level):
            chosen = zip(candidates, wanted, strict=True)
            return {c.name: _bounded(c, rank_of(level), lowest[c.name]) for c, rank_of in chosen}

        # A weight of low rank may stay below break-even at every level, so that none is beyond the budget.
        highest = ranks(math.inf)
        if cost_of(candidates, highest) <= budget:
            return fill(candidates, highest, budget)
        low, high = 0.0, 1.0
        while cost_of(candidates, ranks(high)) <= budget:
            low, high = high, 2 * high
        # Down to neighbouring floating-point numbers: no level between them is left to try.
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if cost_of(candidates, ranks(middle)) <= budget else (low, middle)
        return fill(candidates, ranks(low), budget)


def _singular_values(candidate):
    errors = [candidate.total, *candidate.curve]
    return [math.sqrt(max(before - after, 0.0)) for before, after in zip(errors, errors[1:], strict=False)]


def _by_effective_rank(candidate):
    """The rank at a level."""
    values = _singular_values(candidate)
    total = sum(values)
    entropy = -sum(s / total * math.log(s / total) for s in values if s > 0) if total > 0 else 0.0
    slope = math.sqrt(math.exp(entropy) / (candidate.out_features + candidate.in_features))
    return lambda level: int(min(level * slope, candidate.break_even))


def _by_pooling(candidate):
    """The rank at a level."""
    norm = math.sqrt(candidate.total)
    values = [s / norm if norm > 0 else 0.0 for s in _singular_values(candidate)]
    return lambda level: sum(value * level >= 1 for value in values)


def _bounded(candidate, rank, lowest):
    """An allowed rank up to `rank`, but at least `lowest`; `None` from break-even on."""
    if lowest is None:
        return None
    rank = max(rank, lowest)
    if rank >= candidate.break_even:
        return None
    rank = max(lowest, round_down(rank, candidate.rank_multiple, candidate.least_rank))
    return rank if rank < candidate.break_even else None
