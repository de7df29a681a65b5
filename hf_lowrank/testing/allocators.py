"""What every allocator promises."""

from dataclasses import replace

from ..allocation import Candidate, Probe, cost_of, round_down, within_reach


def make_candidates(shapes, rank_multiple=1):
    """Candidates of two-factor cost for `shapes`, a list of `(out, in)`."""
    return [
        Candidate(
            name=f"layer.{i}",
            out_features=rows,
            in_features=columns,
            copies=1,
            rank_multiple=rank_multiple,
            least_rank=1,
            cost=lambda rank, size=rows + columns: rank * size,
            break_even=-(-rows * columns // (rows + columns)),
            curve=[(rows + columns) * 0.9**rank for rank in range(1, min(rows, columns) + 1)],
            total=float(rows + columns),
        )
        for i, (rows, columns) in enumerate(shapes)
    ]


class SyntheticProbe(Probe):
    """A model whose outputs diverge by the sum of its weights' squared errors, each times a sensitivity.

    Args:
        candidates (`list[Candidate]`): with curves.
        sensitivities (`dict[str, float]`, *optional*): by name; 1 where not given.
        seed (`int`, defaults to 0): as for any probe.
    """

    def __init__(self, candidates, sensitivities=None, seed=0):
        super().__init__(seed)
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.sensitivities = sensitivities or {}
        self.asked = []

    def divergence(self, ranks):
        self.asked.append(dict(ranks))
        return sum(self.sensitivities.get(n, 1.0) * self.candidates[n].curve[rank - 1] for n, rank in ranks.items())

    def loss(self, ranks):
        return 1.0 + self.divergence(ranks) / 1e3


def check_allocator(allocator):
    """Assert the laws of allocators on `allocator`, an instance.

    The budget is met from below, to within one rank step a weight; ranks are allowed ones; equal weights are treated
    equally (an optimal allocator may break ties, and so may one that tells weights apart by name or output); a ratio
    of 1 leaves everything dense; more budget never gives a smaller total, but for search; same input, same ranks. An
    allocator that probes asks for allowed ranks of known weights only.

    Ranks are allowed ones and within the budget too for weights with room for no rank multiple, weights of low rank,
    zero weights, formats that are smaller than dense at every rank, and where the budget is just enough for the lowest
    ranks; how much of it is spent there is the allocator's choice.
    """
    shapes = [(64, 64), (48, 96), (96, 48), (64, 64)]
    for multiple in (1, 8):
        candidates = make_candidates(shapes, multiple)
        total = sum(candidate.dense_cost for candidate in candidates)
        spent_before = 0
        for ratio in (0.3, 0.5, 0.8, 0.95):
            ranks = _allocate(allocator, candidates, ratio * total)
            assert ranks == _allocate(allocator, candidates, ratio * total), "same input, same ranks"
            spent = cost_of(candidates, ranks)
            steps = sum(candidate.cost(multiple) for candidate in candidates)
            assert ratio * total - steps <= spent <= ratio * total
            assert allocator.needs_probe or spent >= spent_before
            spent_before = spent
            if not allocator.needs_curves and not allocator.needs_probe:
                assert ranks["layer.0"] == ranks["layer.3"], "equal weights are treated equally"
        assert set(_allocate(allocator, candidates, total).values()) == {None}
    plain, *others = make_candidates(shapes)
    odd = [plain, *(make(candidate) for make, candidate in zip((_of_low_rank, _zero, _cheap), others, strict=True))]
    first, *rest = make_candidates(shapes, rank_multiple=8)
    coarse = [replace(first, least_rank=8), *rest]
    for candidates, budget in (
        (make_candidates([(32, 32)] * 4, rank_multiple=8), 0.2 * 4 * 32 * 32),
        (odd, 0.9 * sum(candidate.dense_cost for candidate in odd)),
        (coarse, sum(candidate.cost(candidate.least_rank) for candidate in coarse)),
    ):
        assert cost_of(candidates, _allocate(allocator, candidates, budget)) <= budget


def _of_low_rank(candidate):
    tail = candidate.curve[3]
    curve = [max(error - tail, 0.0) for error in candidate.curve]
    return replace(candidate, curve=curve, total=candidate.total - tail)


def _zero(candidate):
    return replace(candidate, curve=[0.0] * len(candidate.curve), total=0.0)


def _cheap(candidate):
    """Smaller than dense at every rank."""
    rows, columns = candidate.out_features, candidate.in_features
    return replace(candidate, cost=lambda rank: rank * max(rows, columns) // 2, break_even=min(rows, columns) + 1)


def _allocate(allocator, candidates, budget):
    candidates = within_reach(candidates, budget)
    if not allocator.needs_probe:
        ranks = allocator.allocate(candidates, budget)
    else:
        assert allocator.search_samples >= 1
        probe = SyntheticProbe(candidates)
        ranks = allocator.allocate(candidates, budget, probe)
        for asked in probe.asked:
            assert None not in asked.values(), "dense weights are not named"
            _check_allowed(candidates, asked)
    assert set(ranks) == {candidate.name for candidate in candidates}
    _check_allowed(candidates, ranks)
    return ranks


def _check_allowed(candidates, ranks):
    for candidate in candidates:
        rank, multiple, least = ranks.get(candidate.name), candidate.rank_multiple, candidate.least_rank
        assert rank is None or (rank < candidate.break_even and rank == round_down(rank, multiple, least))
