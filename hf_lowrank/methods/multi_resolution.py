import math
from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_choice, check_integer, check_number, is_integer, is_number
from ..errors import ConfigError
from ..formats.multi_resolution import MODES, MOST_LEVELS, block_sizes, is_partition
from ..linalg import Terms, middle_factors, multi_resolution, require_finite
from ._measured import Measured
from .base import Factors, register_method


MATRIX = (("o1", "o2"), ("i1", "i2"))
KRONECKER = (("o1", "i1"), ("o2", "i2"))
VECTORS = (("o1",), ("o2",), ("i1",), ("i2",))
ORDERS = ("coarse_to_fine", "fine_to_coarse")


@register_method("multi_resolution")
@dataclass(frozen=True)
class MultiResolution(Measured):
    r"""Low-rank terms of several resolutions, each fitted to what the coarser ones leave; needs no data.

        min |W - sum_l W_l|_F^2,    W_l = split_l(CP_{R_l}(merge_l(residual_l))),    residual_{l+1} = residual_l - W_l,
        W seen as (o1, o2, i1, i2);  l = 1: [[o1, o2], [i1, i2]], a truncated SVD of rank r;
        l = 2: [[o1, i1], [o2, i2]], Kronecker products;  l = 3: outer products of four vectors

    o1 o2 and i1 i2 are the factors of out and in that are closest to each other. The SVD and the Kronecker products
    are the best there are for what is left to them, the outer products are found by alternating least squares. The
    rank of a layer is that of its SVD. Coarse first, the error is at most that of an SVD of this rank; fine first it
    can be far above, also of a weight of this rank. In the numbers of all levels it is not in general below an SVD of
    as many numbers, which is the better choice for weights that have none of this structure.

    Args:
        partitions (`list`, *optional*): the blocks of each level, coarse ones first; `[["o1", "o2"], ["i1", "i2"]]`
            before all others, of which there are three at most. By default the three levels above.
        shares (`list[float]`, defaults to `(0.9, 0.05, 0.05)`): in which proportion the numbers of a layer are divided
            over the levels, each at least 0 and the first above; rounded down to whole terms. Cautious, since each
            term beside the SVD has to be worth its numbers.
        ranks (`list[int]`, *optional*): instead, the terms of the levels after the first, whatever the rank.
        order (`str`, defaults to `"coarse_to_fine"`): in which levels are fitted first; or `"fine_to_coarse"`.
        joint_als_sweeps (`int`, defaults to 0): how often all levels are fitted again, each to what the others leave;
            never worse.
        als_tolerance (`float`, defaults to 1e-3): ends the least squares when a sweep lowers the relative error by
            less, at least 0.
        als_sweeps (`int`, defaults to 100): the most sweeps.
        seed (`int`, defaults to 0): of the start of the least squares.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`, rest the other levels. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        Rozada and Marques, "A multi-resolution low-rank tensor decomposition", 2406.18560, for tensors of any kind;
        weights as four modes, and how the budget is divided, are derived. Differs: levels of two blocks are exact.
    """

    format: ClassVar[str] = "multi_resolution"
    only_format: ClassVar[bool] = True
    partitions: tuple = (MATRIX, KRONECKER, VECTORS)
    shares: tuple = (0.9, 0.05, 0.05)
    ranks: tuple | None = None
    order: str = "coarse_to_fine"
    joint_als_sweeps: int = 0
    als_tolerance: float = 1e-3
    als_sweeps: int = 100
    seed: int = 0

    def __post_init__(self):
        self._check_partitions()
        self._check_division()
        check_choice("order", self.order, ORDERS, self.name)
        check_number("als_tolerance", self.als_tolerance, 0, owner=self.name)
        for name, least in (("joint_als_sweeps", 0), ("als_sweeps", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least, self.name)

    def _check_partitions(self):
        given = self.partitions
        fits = isinstance(given, (list, tuple)) and all(is_partition(blocks) for blocks in given)
        found = tuple(tuple(tuple(block) for block in blocks) for blocks in given) if fits else ()
        if not fits or not 1 <= len(found) <= 1 + MOST_LEVELS or found[0] != MATRIX:
            raise ConfigError(
                f"`partitions`={given!r} of multi_resolution must begin with {[list(block) for block in MATRIX]} and "
                f"have up to {MOST_LEVELS} others, each of {list(MODES)} in two blocks or more."
            )
        object.__setattr__(self, "partitions", found)

    def _check_division(self):
        shares, ranks, levels = self.shares, self.ranks, len(self.partitions)
        if ranks is not None:
            if not isinstance(ranks, (list, tuple)) or [is_integer(r, 0) for r in ranks] != [True] * (levels - 1):
                raise ConfigError(
                    f"`ranks`={ranks!r} of multi_resolution must be {levels - 1} integers of at least 0, the terms of "
                    "the levels after the first."
                )
            object.__setattr__(self, "ranks", tuple(ranks))
            return
        fits = isinstance(shares, (list, tuple)) and [is_number(s) and s >= 0 for s in shares] == [True] * levels
        if not fits or shares[0] == 0:
            raise ConfigError(
                f"`shares`={shares!r} of multi_resolution must be {levels} numbers of at least 0, one for each of its "
                "`partitions`, the first above 0."
            )
        object.__setattr__(self, "shares", tuple(shares))

    def bound(self, rank):
        # Fine first, the SVD meets what Kronecker products leave, which may be anything.
        return rank if self.order == "coarse_to_fine" else 0

    def layout(self, out_features, in_features, rank):
        sizes = _sizes(out_features, in_features)
        levels = [
            {"partition": [list(block) for block in blocks], "terms": terms}
            for blocks, terms in zip(self.partitions[1:], self._terms(sizes, rank), strict=True)
            if terms
        ]
        return {"sizes": list(sizes), "levels": levels} if levels else {}

    def _terms(self, sizes, rank):
        """How many the levels after the first have."""
        numbers, found = rank * sum(block_sizes(MATRIX, sizes)), []
        for place, blocks in enumerate(self.partitions[1:]):
            own = block_sizes(blocks, sizes)
            if self.ranks is None:
                # The product may miss a whole number by a rounding.
                wanted = math.floor(self.shares[1 + place] / self.shares[0] * numbers / sum(own) + 1e-9)
            else:
                wanted = self.ranks[place]
            found.append(min(wanted, math.prod(sizes) // max(own)))
        return found

    def factorize(self, weight, rank, stats):
        require_finite(weight, "The weight")
        weight, sizes = weight.double(), _sizes(*weight.shape)
        levels = multi_resolution(
            weight.reshape(sizes),
            [[[MODES.index(mode) for mode in block] for block in blocks] for blocks in self.partitions],
            [rank, *self._terms(sizes, rank)],
            self.order,
            self.joint_als_sweeps,
            self.seed,
            self.als_tolerance,
            self.als_sweeps,
        )
        left, right = levels[0].factors
        finer = [level for level in levels[1:] if level is not None]
        rest = Terms(finer, sizes) if finer else None
        return self.measured(weight, Factors(left.T, right, None, rest=rest, layout=self.layout(*weight.shape, rank)))


def _sizes(out_features, in_features):
    """`(o1, o2, i1, i2)`; o1 is the smaller of its pair and i1 the larger, so that Kronecker factors are alike."""
    return (*middle_factors(out_features), *middle_factors(in_features)[::-1])
