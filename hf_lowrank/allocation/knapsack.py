from dataclasses import dataclass

import numpy as np

from ..checks import check_choice, check_integer
from .base import Allocator, register_allocator
from .rounding import allowed_ranks


# Partial solutions kept a layer. Below it the result is optimal; beyond it, within the gap of the linear relaxation.
STATES = 20_000
COSTS = ("parameters", "latency")


@register_allocator("knapsack")
@dataclass(frozen=True)
class Knapsack(Allocator):
    r"""The ranks with the least total error that fit the budget; every weight may stay dense.

        min sum_l e_l(r_l)    subject to    sum_l cost_l(r_l) <= budget,    r_l in {multiples} or dense (e = 0)

    A multiple-choice knapsack, solved by dynamic programming over partial solutions; those that the linear relaxation
    proves worse than a known solution are dropped, which leaves few. Errors of different layers must be in the same
    unit: use a method whose objective is the loss (`kfac_svd`). On `whitened_svd`, a global allocation is worse than
    none.

    Args:
        cost (`str`, defaults to `"parameters"`): what the budget counts: what is stored, or `"latency"`, the time of
            one forward pass through the targeted layers. `param_ratio` is then the fraction of the dense layers' time,
            and a layer whose factors are not faster stays dense.
        rows (`int`, defaults to 1): inputs at a time while latency is measured; 1 is the decoding of one sequence.
        latencies (`str`, *optional*): file of measured latencies to use instead of measuring; see
            `hf_lowrank.measure_latencies`.

    Raises:
        ConfigError: an option that is not allowed.

    Reference:
        Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 1979, for the relaxation.
        LEMS (ICML 2026) poses the same problem with a loss probe a matrix and an integer-programming solver.
        Choosing ranks by measured latency: 2407.20266, from memory. Differs: it looks for the largest jump of the
        latency over ranks, one layer at a time; here latency is the cost in a common budget.
    """

    needs_curves = True
    cost: str = "parameters"
    rows: int = 1
    latencies: str | None = None

    def __post_init__(self):
        check_choice("cost", self.cost, COSTS, self.name)
        check_integer("rows", self.rows, 1, self.name)

    def allocate(self, candidates, budget):
        options = [_options(candidate) for candidate in candidates]
        # Weights with the steepest curves first: partial solutions then differ where it matters.
        order = sorted(range(len(options)), key=lambda i: -options[i][1][0])
        picked = _solve([options[i][:2] for i in order], budget)
        return {candidates[i].name: options[i][2][choice] for i, choice in zip(order, picked, strict=True)}


def _options(candidate):
    """`(costs, errors, ranks)` of everything this weight may become, by rising cost; the last is dense."""
    ranks = allowed_ranks(candidate)
    costs = [candidate.cost(rank) for rank in ranks] + [candidate.dense_cost]
    errors = [float(candidate.curve[rank - 1]) for rank in ranks] + [0.0]
    costs, errors = np.array(costs, dtype=np.int64), np.maximum(errors, 0.0)
    # Measured costs have plateaus, of which only the last rank is worth choosing.
    last = np.flatnonzero(np.append(np.diff(costs) > 0, True))
    return costs[last], errors[last], [[*ranks, None][i] for i in last]


def _hull(costs, errors):
    """Indices of the lower convex hull of (cost, error)."""
    kept = []
    for i in range(len(costs)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (errors[a] - errors[b]) * (costs[i] - costs[a]) <= (errors[a] - errors[i]) * (costs[b] - costs[a]):
                kept.pop()
            else:
                break
        kept.append(i)
    return kept


class _Relaxation:
    """Least error of some weights under a budget, if ranks could be mixed: a convex function of the budget."""

    def __init__(self, options):
        steps = []
        self.cost, self.error = 0, 0.0
        for costs, errors in options:
            hull = _hull(costs, errors)
            self.cost += costs[hull[0]]
            self.error += errors[hull[0]]
            for a, b in zip(hull, hull[1:], strict=False):
                steps.append((costs[b] - costs[a], errors[a] - errors[b]))
        steps.sort(key=lambda step: -step[1] / step[0])
        self.costs = self.cost + np.cumsum([0, *(step[0] for step in steps)])
        self.errors = self.error - np.cumsum([0.0, *(step[1] for step in steps)])

    def __call__(self, budgets):
        bound = np.interp(budgets, self.costs, self.errors)
        return np.where(budgets < self.cost, np.inf, bound)


def _greedy(options, budget):
    """A feasible solution: walk down the hulls by error saved a number spent, then take whatever single steps fit."""
    hulls = [_hull(*option) for option in options]
    position = [0] * len(options)
    left = budget - sum(option[0][hull[0]] for option, hull in zip(options, hulls, strict=True))
    steps = sorted(
        (
            (-(errors[a] - errors[b]) / (costs[b] - costs[a]), i, k + 1)
            for i, ((costs, errors), hull) in enumerate(zip(options, hulls, strict=True))
            for k, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
        ),
    )
    for _, i, k in steps:
        costs, hull = options[i][0], hulls[i]
        if position[i] == k - 1 and costs[hull[k]] - costs[hull[k - 1]] <= left:
            left -= costs[hull[k]] - costs[hull[k - 1]]
            position[i] = k
    return [hull[k] for hull, k in zip(hulls, position, strict=True)]


def _solve(options, budget):
    """The choice for each weight."""
    cheapest = [int(np.argmin(costs)) for costs, _ in options]
    if sum(costs[i] for (costs, _), i in zip(options, cheapest, strict=True)) > budget:
        # Not even the lowest ranks fit: those are as close as factors can come.
        return cheapest
    known = _greedy(options, budget)
    best = sum(errors[i] for (_, errors), i in zip(options, known, strict=True))
    cost, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    history = []
    for index, (costs, errors) in enumerate(options):
        rest = _Relaxation(options[index + 1 :])
        all_costs = (cost[:, None] + costs).ravel()
        all_errors = (error[:, None] + errors).ravel()
        bounds = all_errors + rest(budget - all_costs)
        promising = np.flatnonzero(bounds <= best * (1 + 1e-12))
        # Of equal cost the least error first; then only states that are better than every cheaper one stay.
        promising = promising[np.lexsort((all_errors[promising], all_costs[promising]))]
        floor = np.minimum.accumulate(np.concatenate([[np.inf], all_errors[promising][:-1]]))
        promising = promising[all_errors[promising] < floor]
        if len(promising) == 0:
            return known
        if len(promising) > STATES:
            promising = np.sort(promising[np.argsort(bounds[promising])[:STATES]])
        history.append(np.stack([promising // len(costs), promising % len(costs)]))
        cost, error = all_costs[promising], all_errors[promising]
    state, choices = int(np.argmin(error)), []
    for parents, picked in reversed(history):
        choices.append(int(picked[state]))
        state = int(parents[state])
    return choices[::-1]
