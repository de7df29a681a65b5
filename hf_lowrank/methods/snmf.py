from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_integer
from ..linalg import semi_nonnegative
from ._measured import Measured
from .base import Factors, register_method


@register_method("snmf")
@dataclass(frozen=True)
class SemiNMF(Measured):
    r"""Two factors of which `right` has no negative entry: what each component adds is read off its sign in `left`.

        min |W - L R|_F^2    over    L,  R >= 0

    Never worse than an SVD of one rank less, never better than one of the same rank ([`semi_nonnegative`]). The factor
    is what the method is for; whoever wants a small error takes `svd`.

    Args:
        sweeps (`int`, defaults to 20): alternations between the factors, at least 0.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        Greenformers (thesis, 2021), solver `snmf`, which is that of Ding, Li and Jordan, TPAMI 2010. Differs: start
        and steps, see [`semi_nonnegative`].
    """

    searches: ClassVar[bool] = False
    sweeps: int = 20

    def __post_init__(self):
        check_integer("sweeps", self.sweeps, 0, self.name)

    def bound(self, rank):
        return rank - 1

    def factorize(self, weight, rank, stats):
        left, right = semi_nonnegative(weight, rank, self.sweeps)
        return self.measured(weight.double(), Factors(left, right, None))
