from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_choice, check_number
from ._column_weighted import ColumnWeighted
from .base import register_method


SCALES = ("mean_abs", "rms")
# Relative to the largest magnitude: a channel that calibration never excites keeps a little weight.
LEAST = 1e-6


@register_method("asvd")
@dataclass(frozen=True)
class ASVD(ColumnWeighted):
    r"""Truncated SVD of the weight with input channels scaled by the size of their activations.

        min_{rank r} |(W - W') D|_F^2,    D = diag(s_j^alpha),    U S V^T = svd(W D),    W' = U_r S_r V_r^T D^-1,
        minimum = sum_{i > r} S_i^2

    With `alpha=1` and `scale="rms"` this is the least output error if channels were uncorrelated, which they are not:
    [`WhitenedSVD`] is the optimum. It needs two numbers a channel where that needs a matrix.

    Args:
        alpha (`float`, defaults to 0.5): exponent of the magnitudes, at least 0; at 0 this is plain SVD.
        scale (`str`, defaults to `"mean_abs"`): magnitude of a channel over tokens, `"mean_abs"` for the mean of
            |x_j|, `"rms"` for the root of the mean of x_j^2. Magnitudes below 1e-6 of the largest are raised to it.

    Shapes:
        weight `(out, in)`, statistic `input_norm` `(2, in)`, left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or the magnitudes hold NaN or infinity.

    Reference:
        ASVD (2023, hahnyuan/ASVD4LLM); the magnitude and the default of `alpha` from memory.
        Differs: nothing is divided by D (`U_r U_r^T W` is the same matrix), no search for ranks by perplexity; the
        authors' clamp of zeros is not confirmed, ours is above.
    """

    statistics: ClassVar[tuple] = ("input_norm",)
    alpha: float = 0.5
    scale: str = "mean_abs"

    def __post_init__(self):
        check_number("alpha", self.alpha, 0, owner=self.name)
        check_choice("scale", self.scale, SCALES, self.name)

    def scales(self, stats):
        magnitudes = stats["input_norm"].double()[SCALES.index(self.scale)]
        return magnitudes.clamp(min=LEAST * magnitudes.max()) ** self.alpha
