from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_integer, check_number
from ..linalg import balanced, largest_entries, require_finite, sparse_matrix, truncated_svd
from ._measured import Measured
from .base import Factors, register_method


@register_method("sparse_low_rank")
@dataclass(frozen=True)
class SparseLowRank(Measured):
    r"""Two factors and the single entries that they miss most, of a weight that is trained already; needs no data.

        min_{rank r, n entries} |W - L R - S|_F^2,    in turn    L R = svd_r(W - S),    S = the n largest of W - L R

    Each step is the exact minimum for what the other holds, so that no sweep makes the error larger, and it is never
    above that of the first, `svd_r(W)`. The two together are not solved exactly, and the error need not fall with
    every single rank. To train with this structure from scratch, use [`SLTrain`].

    Args:
        density (`float`, defaults to 0.03): n as a share of the entries of the weight, in [0, 1]. An entry costs two
            numbers, its value and its place.
        sweeps (`int`, defaults to 4): how often both steps are made, at least 1.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`, rest `(out, in)` with n entries. Computed in float64, on
        some copies of the whole weight.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        Zhou and Tao, "GoDec: randomized low-rank and sparse matrix decomposition in noisy case", ICML 2011. Differs:
        exact decompositions. As a start for the format of SLTrain (2406.02214), which makes it from scratch.
    """

    format: ClassVar[str] = "sparse_low_rank"
    only_format: ClassVar[bool] = True
    density: float = 0.03
    sweeps: int = 4

    def __post_init__(self):
        check_number("density", self.density, 0, 1, self.name)
        check_integer("sweeps", self.sweeps, 1, self.name)

    def layout(self, out_features, in_features, rank):
        return {"nonzeros": round(self.density * out_features * in_features)}

    def factorize(self, weight, rank, stats):
        require_finite(weight, "The weight")
        weight = weight.double()
        count = self.layout(*weight.shape, rank)["nonzeros"]
        entries = torch.zeros_like(weight)
        for _ in range(self.sweeps if count else 1):
            left, right, _ = truncated_svd(weight - entries, rank)
            residual = weight - left @ right
            places = largest_entries(residual, count)
            values = residual.flatten()[places]
            entries = torch.zeros_like(weight).flatten().index_copy(0, places, values).view_as(weight)
        left, right = balanced(left, right)
        rest = sparse_matrix(places, values, weight.shape) if count else None
        return self.measured(weight, Factors(left, right, None, rest=rest, layout={"nonzeros": count}))
