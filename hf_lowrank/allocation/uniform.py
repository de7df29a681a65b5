from dataclasses import dataclass

from .base import Allocator, register_allocator
from .rounding import round_down


@register_allocator("uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    r"""The same kept fraction for every weight.

        r = floor(ratio * out * in / (out + in)) for two factors, rounded down to the rank multiple;
        a weight whose rank would reach break-even stays dense.

    The budget is met from below, to within one rank step a weight.

    Reference:
        What SVD-LLM and most of its successors do by default.
    """

    def allocate(self, candidates, budget):
        total = sum(candidate.dense_cost for candidate in candidates)
        return {candidate.name: self._rank(candidate, budget / total) for candidate in candidates}

    @staticmethod
    def _rank(candidate, ratio):
        if ratio >= 1:
            return None
        low, high = 1, min(candidate.break_even, candidate.out_features, candidate.in_features)
        # The cost of every format grows with the rank, so the largest affordable rank is found by bisection.
        while low < high:
            middle = (low + high + 1) // 2
            if candidate.cost(middle) <= ratio * candidate.dense_cost:
                low = middle
            else:
                high = middle - 1
        rank = round_down(low, candidate.rank_multiple, candidate.least_rank)
        return rank if rank < candidate.break_even else None
