from dataclasses import dataclass

from ..checks import check_choice, check_integer, check_number
from .base import Allocator, register_allocator
from .rounding import allowed_ranks, foot_of_step, uniform_ranks


ROUNDINGS = ("multiple", "latency")


@register_allocator("uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    r"""The same kept fraction for every weight.

        r = floor(ratio * out * in / (out + in)) for two factors, rounded down to the rank multiple;
        a weight whose rank would reach break-even stays dense.

    The budget is met from below, to within one rank step a weight. With `rounding="latency"` ranks go further down, to
    the foot of the highest step of the measured time t between `span * r` and r,

        argmax_k t(k + 1) - t(k),    k over rank multiples, k + 1 the next one,

    and a weight whose factors are not faster than dense there stays dense. That is for kernels that work in tiles;
    where time rises evenly, the choice is arbitrary.

    Args:
        rounding (`str`, defaults to `"multiple"`): or `"latency"`.
        span (`float`, defaults to 0.5): the lowest rank that latency may round to, as a part of r, in (0, 1].
        rows (`int`, defaults to 1): inputs at a time while latency is measured; 1 is the decoding of one sequence.
        latencies (`str`, *optional*): file of measured latencies to use instead of measuring; see
            `hf_lowrank.measure_latencies`.

    Raises:
        ConfigError: an option that is not allowed.

    Reference:
        What SVD-LLM and most of its successors do by default. Rounding by latency: 2407.20266, from memory; how far
        down it looks is reconstructed.
    """

    rounding: str = "multiple"
    span: float = 0.5
    rows: int = 1
    latencies: str | None = None

    def __post_init__(self):
        check_choice("rounding", self.rounding, ROUNDINGS, self.name)
        check_number("span", self.span, 0, 1, self.name, open_low=True)
        check_integer("rows", self.rows, 1, self.name)

    @property
    def needs_latencies(self):
        return self.rounding == "latency"

    def allocate(self, candidates, budget):
        ranks = uniform_ranks(candidates, budget)
        if self.rounding == "latency":
            ranks = {candidate.name: self._rounded(candidate, ranks[candidate.name]) for candidate in candidates}
        return ranks

    def _rounded(self, candidate, rank):
        if rank is None or candidate.time is None:
            return rank
        allowed = allowed_ranks(candidate)
        ranks = [r for r in allowed if self.span * rank <= r <= rank] + [r for r in allowed if r > rank][:1]
        foot = foot_of_step(ranks, [candidate.time(r) for r in ranks]) if len(ranks) > 1 else rank
        return foot if candidate.time(foot) < candidate.dense_time else None
