from dataclasses import dataclass
from heapq import heappop, heappush

from ..checks import check_number
from .base import Allocator, register_allocator
from .rounding import allowed_ranks, fill


@register_allocator("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Allocator):
    r"""Drops singular values of all weights such that the changes of the loss that they predict cancel.

        dL_i = -s_i u_i^T (D L^-T) v_i,    W L = U S V^T,    D = d loss / d W,    sum of the dropped dL_i ~ 0

    Each weight offers its smallest singular value that is left. While the sum of what has been dropped is not above
    zero, the offer with the smallest rise of the loss is taken, else the one with the smallest fall; if there is none
    of the kind, the smallest of the other. It ends where the budget is met by the allowed ranks next above those that
    are left: a weight counts as dense until its factors are smaller. What is left of the budget is spent on the
    weights in their order.

    First derivatives say nothing about the curvature, by which most of the loss grows: the nearer a budget is to 1,
    the better they tell layers apart. Reads the gradients of the loss on labels in the data (text has them), so that
    calibration data has to be real: where labels are drawn from the model, or text is its own, the gradients are
    noise. Goes with methods whose factors at one rank begin with those at a lower one (`whitened_svd`, `svd`, `asvd`),
    except where these read gradients of another loss (`kfac_svd`).

    Args:
        least (`float`, defaults to 0.0): no weight keeps less than this part of its break-even rank, in [0, 1].

    Raises:
        ConfigError: an option that is not allowed.

    Reference:
        Zero Sum SVD (ICML 2026), https://arxiv.org/abs/2602.02848 and mint-vu/Zero-Sum-SVD, whose rule this is,
        `least` included (0.3 there when 40 % is kept). Differs: one selection, without its five rounds of a gradient
        step and another truncation; ranks are rounded.
    """

    needs_curves = True
    first_order = True
    statistics = ("weight_gradient",)

    least: float = 0.0

    def __post_init__(self):
        check_number("least", self.least, 0, 1, self.name)

    def allocate(self, candidates, budget):
        weights = [_Weight(candidate, self.least) for candidate in candidates]
        # (size of the change, position): of those that raise the loss, and of those that do not.
        offers = {True: [], False: []}

        def offer(position):
            change = weights[position].next_change()
            if change is not None:
                heappush(offers[change > 0], (abs(change), position))

        for position in range(len(weights)):
            offer(position)
        cost, total = sum(weight.cost for weight in weights), 0.0
        while cost > budget and (offers[True] or offers[False]):
            wanted = total <= 0
            raises = wanted if offers[wanted] else not wanted
            size, position = heappop(offers[raises])
            total += size if raises else -size
            cost += weights[position].drop()
            offer(position)
        return fill(candidates, {weight.name: weight.allowed for weight in weights}, budget)


class _Weight:
    """What is left of one weight.

    Args:
        candidate ([`Candidate`]): whose curve holds predicted changes of the loss.
        least (`float`): part of the break-even rank that is kept.
    """

    def __init__(self, candidate, least):
        self.name, self.candidate = candidate.name, candidate
        self.ranks = allowed_ranks(candidate)
        self.rank = min(candidate.out_features, candidate.in_features)
        self.lowest = next((r for r in self.ranks if r >= least * candidate.break_even), self.rank)
        self.changes = [candidate.total, *candidate.curve]
        self.allowed, self.cost = None, candidate.dense_cost

    def next_change(self):
        """What dropping one more singular value does to the loss; `None` at the lowest rank."""
        return self.changes[self.rank - 1] - self.changes[self.rank] if self.rank > self.lowest else None

    def drop(self):
        """Drop it, and return what that does to the cost."""
        self.rank -= 1
        before = self.cost
        while self.ranks and self.ranks[-1] >= self.rank:
            self.allowed = self.ranks.pop()
            self.cost = self.candidate.cost(self.allowed)
        return self.cost - before
