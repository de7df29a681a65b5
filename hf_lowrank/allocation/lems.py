from dataclasses import dataclass, replace

from ..checks import check_integer, check_number
from .base import Allocator, register_allocator
from .knapsack import Knapsack
from .rounding import allowed_ranks, rank_at


# Errors below this part of the total are rounding: beyond the numerical rank, curves hold some 1e-16 of it, not zeros.
ROUNDING = 1e-10
# Nats below which a divergence of float32 logits is rounding.
MEASURABLE = 1e-7


@register_allocator("lems")
@dataclass(frozen=True)
class Lems(Allocator):
    r"""The knapsack over error curves that one probe of the model a matrix has put into the same unit.

        e_l(r) = KL_l * tail_l(r) / tail_l(r0) * (1 + gamma h(l)),    min sum_l e_l(r_l) as in `knapsack`

    KL_l is the divergence of the model's output with only matrix l factorized, at the probe rank r0; tail_l(r) is the
    squared error at rank r in the method's metric; h(l) runs from 0 for the first matrix to 1 for the last. Makes any
    method's errors comparable between layers, at the price of one factorization and one pass over the search samples
    for every matrix. Where an error or a divergence is too small to measure, r0 is a lower rank.

    Args:
        probe_ratio (`float`, defaults to 0.1): fraction of a matrix' cost that the probe removes, in (0, 1).
        search_samples (`int`, defaults to 32): calibration sequences that outputs are compared on, at least 1.
        depth_gamma (`float`, defaults to 0.0): how much more errors in the last matrix count than in the first, above
            -1.

    Raises:
        ConfigError: an option outside its range.

    Reference:
        LEMS (ICML 2026, lems-svd/lems). Reconstructed: that a probe of 10 % removes 10 %, and the shape of the depth
        bias h. Differs: depth_gamma is an argument, where the original searches it (and an exponent alpha) in 10
        trials; the knapsack is solved by dynamic programming instead of an integer-programming library.
    """

    needs_curves = True
    needs_probe = True
    probe_ratio: float = 0.1
    search_samples: int = 32
    depth_gamma: float = 0.0

    def __post_init__(self):
        check_number("probe_ratio", self.probe_ratio, 0, 1, self.name, open_low=True, open_high=True)
        check_integer("search_samples", self.search_samples, 1, self.name)
        # Below, errors would turn negative.
        check_number("depth_gamma", self.depth_gamma, -1, owner=self.name, open_low=True)

    def allocate(self, candidates, budget, probe):
        last = max(len(candidates) - 1, 1)
        scaled = []
        for position, candidate in enumerate(candidates):
            scale = self._scale(candidate, probe) * (1 + self.depth_gamma * position / last)
            scaled.append(replace(candidate, curve=[scale * error for error in candidate.curve]))
        return Knapsack().allocate(scaled, budget)

    def _scale(self, candidate, probe):
        """Divergence a unit of squared error, at half the rank while it is too small to measure."""
        rank = rank_at(candidate, 1 - self.probe_ratio)
        # Of a weight with a rank below the probe's, only lower ranks tell anything.
        lossy = [
            r
            for r in allowed_ranks(candidate)
            if (rank is None or r <= rank) and candidate.curve[r - 1] > ROUNDING * candidate.total
        ]
        scale = 0.0
        while lossy:
            divergence = probe.divergence({candidate.name: lossy[-1]})
            scale = divergence / candidate.curve[lossy[-1] - 1]
            lossy = lossy[: len(lossy) // 2] if divergence < MEASURABLE else []
        return scale
