from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_boolean
from ..linalg import output_energies, output_optimal, require_finite, times
from .base import Factors, Method, register_method


@register_method("feature_pca")
@dataclass(frozen=True)
class FeaturePCA(Method):
    r"""Principal components of a layer's centred outputs; a new bias restores their mean.

        min_{rank r} tr((W - W') C (W - W')^T),    C = Cov(x),    Q = eig_r(W C W^T) = eig_r(Cov(y)),
        left = Q,    right = Q^T W,    b' = b + (I - Q Q^T) W mean(x),    minimum = sum_{i > r} eig_i(W C W^T)

    The mean of the outputs needs no rank this way: at equal rank the mean squared output error is at most that of
    [`WhitenedSVD`], which spends a direction on it. Every layer has a bias afterwards, `out` numbers that count
    against the budget where the dense layer had none.

    Args:
        bias_correction (`bool`, defaults to `True`): whether the bias is changed. Without it outputs are off by
            `(I - Q Q^T) W mean(x)`, no bias is added, and experts can be factorized.

    Shapes:
        weight `(out, in)`, statistics `input_covariance` `(in, in)` and `input_mean` `(in,)`, left `(out, r)`
        orthonormal, right `(r, in)`, shift `(out,)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or a statistic holds NaN or infinity.

    Reference:
        Bolaco, EMNLP Findings 2024, https://arxiv.org/abs/2405.10616. Differs: covariance and mean are those of the
        inputs, which layers with one input share, and `Cov(y) = W Cov(x) W^T` (derived); the paper's
        `b' = Q Q^T b + (I - Q Q^T) mean(y)` is the same bias. The paper never compresses the value projections of
        attention and chooses ranks by a search: say so with `exclude_modules` and `rank_pattern`.
    """

    statistics: ClassVar[tuple] = ("input_covariance", "input_mean")
    nested: ClassVar[bool] = True
    bias_correction: bool = True

    def __post_init__(self):
        check_boolean("bias_correction", self.bias_correction, self.name)

    @property
    def shifts(self):
        return self.bias_correction

    def factorize(self, weight, rank, stats):
        left, right, energies = output_optimal(weight, stats["input_covariance"].double(), rank)
        return Factors.from_energies(left, right, energies, self._shift(weight, left, right, stats))

    def objective(self, difference, stats):
        return ((difference @ stats["input_covariance"].double()) * difference).sum()

    def energies(self, weight, stats):
        return output_energies(weight, stats["input_covariance"].double())

    def _shift(self, weight, left, right, stats):
        if not self.bias_correction:
            return None
        mean = stats["input_mean"].double()
        require_finite(mean, "The mean of the inputs")
        return times(weight, mean[:, None])[:, 0] - left @ (right @ mean)
