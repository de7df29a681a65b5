"""Ranks that a kernel likes: multiples, rounded so that neither the budget nor the allowed range is left."""

from dataclasses import replace


# Halvings of the interval in which the largest scale within a budget is looked for: down to rounding.
BISECTIONS = 50


def round_down(rank, multiple, least=1):
    """The largest allowed rank up to `rank`: a multiple of `multiple`, or below it the largest halving that fits.

    A small matrix has no room for multiples of 8: there 4, 2 or 1 is used, so the budget still holds. `least` is what
    the kernel insists on; a rank below it is raised to it.
    """
    if rank >= multiple:
        return rank - rank % multiple
    return max(halving for halving in _halvings(multiple, least) if halving <= max(rank, least))


def allowed_ranks(candidate):
    """The ranks to choose from, rising: multiples that save something, of the largest halving with room for one."""
    limit = min(candidate.break_even, candidate.out_features + 1, candidate.in_features + 1)
    fitting = [halving for halving in _halvings(candidate.rank_multiple, candidate.least_rank) if halving < limit]
    return list(range(max(fitting), limit, max(fitting))) if fitting else []


def within_reach(candidates, budget):
    """`candidates`, whose rank multiples are halved together as long as their lowest allowed ranks exceed `budget`."""

    def lowest():
        return {candidate.name: next(iter(allowed_ranks(candidate)), None) for candidate in candidates}

    while cost_of(candidates, lowest()) > budget and any(c.rank_multiple > c.least_rank for c in candidates):
        candidates = [replace(candidate, rank_multiple=_half(candidate)) for candidate in candidates]
    return candidates


def _half(candidate):
    below = _halvings(candidate.rank_multiple, candidate.least_rank) - {candidate.rank_multiple}
    return max(below, default=candidate.least_rank)


def _halvings(multiple, least):
    """`multiple`, its half and so on, as long as these are multiples of `least`, and `least` itself."""
    found = {least, multiple}
    while multiple % (2 * least) == 0:
        multiple //= 2
        found.add(multiple)
    return found


def rank_at(candidate, ratio):
    """The largest rank, rounded down, that costs at most `ratio` of the dense weight; `None` where that is dense."""
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


def cost_of(candidates, ranks):
    """What `ranks` cost together."""
    return sum(c.dense_cost if ranks[c.name] is None else c.cost(ranks[c.name]) for c in candidates)


def largest_within(candidates, ranks_at, budget, high):
    """`ranks_at` the largest scale up to `high` at which they fit the budget; at 0 where they never do."""
    low = 0.0
    if cost_of(candidates, ranks_at(high)) <= budget:
        return ranks_at(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if cost_of(candidates, ranks_at(middle)) <= budget:
            low = middle
        else:
            high = middle
    return ranks_at(low)


def uniform_ranks(candidates, budget):
    """The same kept fraction for every weight, a lower one than the budget's where some cannot be that small."""
    total = sum(candidate.dense_cost for candidate in candidates)

    def ranks_at(ratio):
        return {candidate.name: rank_at(candidate, ratio) for candidate in candidates}

    return largest_within(candidates, ranks_at, budget, budget / total)


def fill(candidates, ranks, budget):
    """Spend what rounding left over: raise one weight after the other by one step, in turn, while the budget lasts.

    Args:
        candidates (`list[Candidate]`): in the order in which they are raised.
        ranks (`dict[str, int | None]`): within the budget, or at the lowest ranks beyond it.
        budget (`float`): what all of them together may cost.

    Returns:
        `dict[str, int | None]`: ranks from which no single step fits the budget any more.
    """
    ranks, left = dict(ranks), budget - cost_of(candidates, ranks)
    raised = True
    while raised:
        raised = False
        for candidate in candidates:
            rank = ranks[candidate.name]
            if rank is None:
                continue
            above = next((r for r in allowed_ranks(candidate) if r > rank), None)
            step = (candidate.dense_cost if above is None else candidate.cost(above)) - candidate.cost(rank)
            if step <= left:
                ranks[candidate.name] = above
                left -= step
                raised = True
    return ranks


def foot_of_step(ranks, times):
    """The rank at the foot of the highest step of a staircase: the next one costs most.

    Args:
        ranks (`list[int]`): rising, two at least; the last is only looked at.
        times (`list[int]`): of each.

    Returns:
        `int`, the highest of several feet of equal steps.
    """
    rises = [above - time for time, above in zip(times, times[1:], strict=False)]
    return max(rank for rank, rise in zip(ranks, rises, strict=False) if rise == max(rises))
