"""What every allocator promises."""

from ..allocation import Candidate


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
        )
        for i, (rows, columns) in enumerate(shapes)
    ]


def check_allocator(allocator):
    """Assert the laws of allocators on `allocator`, an instance.

    The budget is met from below, to within one rank step a weight; ranks are allowed ones; equal weights are treated
    equally (an optimal allocator may break ties); a ratio of 1 leaves everything dense; more budget never gives a
    smaller total.
    """
    shapes = [(64, 64), (48, 96), (96, 48), (64, 64)]
    for multiple in (1, 8):
        candidates = make_candidates(shapes, multiple)
        total = sum(candidate.dense_cost for candidate in candidates)
        spent_before = 0
        for ratio in (0.3, 0.5, 0.8, 0.95):
            ranks = allocator.allocate(candidates, ratio * total)
            assert set(ranks) == {candidate.name for candidate in candidates}
            spent = 0
            for candidate in candidates:
                rank = ranks[candidate.name]
                if rank is None:
                    spent += candidate.dense_cost
                    continue
                assert 1 <= rank < candidate.break_even
                assert rank % multiple == 0
                spent += candidate.cost(rank)
            steps = sum(candidate.cost(multiple) for candidate in candidates)
            assert ratio * total - steps <= spent <= ratio * total
            assert spent >= spent_before
            spent_before = spent
            if not allocator.needs_curves:
                assert ranks["layer.0"] == ranks["layer.3"], "equal weights are treated equally"
        assert set(allocator.allocate(candidates, total).values()) == {None}
