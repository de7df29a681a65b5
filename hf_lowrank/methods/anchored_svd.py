from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_boolean, check_choice, check_number
from ..linalg import require_finite, shrink
from .base import Method, register_method
from .kfac_svd import TARGETS, KfacSVD
from .whitened_svd import WhitenedSVD


@register_method("anchored_svd")
@dataclass(frozen=True)
class AnchoredSVD(Method):
    r"""Factors that give the outputs of the dense model from the inputs of the compressed one.

    Blocks are factorized in order. Each weight sees the inputs Y that the factorized weights in front of it make, and
    aims at what it gave for the inputs X of the dense model:

        min_{rank r} tr(G E^T E),    E = X W^T - Y W'^T + ridge,    that is
        W~ = (W A + l W) (B + l I)^-1,    A = X^T Y,    B = Y^T Y,    l = ridge mean(diag B),
        W' = the best rank r for W~ in the metric of B + l I and G.

    G is the second moment of the loss gradients with `two_sided`, as in `kfac_svd`, and the identity without. Errors
    in front are made up for as far as a linear map can, with no training. The dense and the compressed model run side
    by side, block by block, so that both stand in memory. Where no data passes (error curves, saved statistics) Y is
    X and the method is `kfac_svd` or `whitened_svd`; so it is for weights outside the repeated blocks, for experts,
    and for weights that run more than once in their block.

    Args:
        two_sided (`bool`, defaults to `True`): whether G enters. Without a loss at hand, say `False`.
        ridge (`float`, defaults to 0.1): how strongly W' is held to W, as a fraction of the mean squared input, above
            0. The less data, the more of it.
        beta (`float`, defaults to 1.0): how far W~ goes from the weight (0) to the anchored one (1), in [0, 1].
        grad_shrinkage (`float`, defaults to 0.1): fraction in [0, 1) by which G is shrunk to `shrinkage_target`.
        shrinkage_target (`str`, defaults to `"identity"`): as in `kfac_svd`, of G; with `"diagonal"` the ridge, too,
            is l = ridge diag B instead of a multiple of I. Only `two_sided`.

    Shapes:
        weight `(out, in)`, statistics `input_gram` `(in, in)` and with `two_sided` `gradient_gram` `(out, out)`;
        while it runs `compressed_gram` B and `cross_gram` A, both `(in, in)`. left `(out, r)`, right `(r, in)`.
        Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or a statistic holds NaN or infinity.

    Reference:
        AA-SVD (2026, atulkumarin/AA-SVD), objective 4; beta in the spirit of SAES-SVD (ICLR 2026), whose adaptive
        rule is not confirmed. Differs: the ridge, which the optimum takes into account; the two-sided metric; ranks
        from a global allocation.
    """

    format: ClassVar[str] = "pivoted"
    anchored: ClassVar[bool] = True
    two_sided: bool = True
    ridge: float = 0.1
    beta: float = 1.0
    grad_shrinkage: float = 0.1
    shrinkage_target: str = "identity"

    def __post_init__(self):
        check_boolean("two_sided", self.two_sided, self.name)
        check_number("ridge", self.ridge, 0, owner=self.name, open_low=True)
        check_number("beta", self.beta, 0, 1, self.name)
        check_number("grad_shrinkage", self.grad_shrinkage, 0, 1, self.name, open_high=True)
        check_choice("shrinkage_target", self.shrinkage_target, TARGETS if self.two_sided else TARGETS[:1], self.name)

    @property
    def statistics(self):
        """What it reads of the dense model."""
        return self._metric.statistics

    @property
    def allocation(self):
        """Global where errors are in the unit of the loss."""
        return self._metric.allocation

    def factorize(self, weight, rank, stats):
        return self._metric.factorize(self.target(weight, stats), rank, self._seen(stats))

    def objective(self, difference, stats):
        return self._metric.objective(difference, self._seen(stats))

    def energies(self, weight, stats):
        return self._metric.energies(self.target(weight, stats), self._seen(stats))

    def target(self, weight, stats):
        """The matrix `(out, in)` that is approximated: W~, or the weight where the models have not been compared."""
        if "cross_gram" not in stats:
            return weight
        require_finite(weight, "The weight")
        gram, cross = stats["compressed_gram"].double(), stats["cross_gram"].double()
        cross = self.beta * cross + (1 - self.beta) * gram
        require_finite(cross, "The cross-Gram matrix")
        if not gram.diagonal().mean() > 0:
            return weight
        held = (1 + self.ridge) * shrink(gram, self._shrinkage, self.shrinkage_target)
        # W + (W A - W B) (B + l I)^-1: what is solved for is the correction, which vanishes with the difference.
        correction = weight.double() @ (cross - gram)
        return weight.double() + torch.linalg.solve(held, correction, left=False)

    @property
    def _shrinkage(self):
        """The `a` that makes (1 - a) B + a T a multiple of B + ridge T."""
        return self.ridge / (1 + self.ridge)

    @property
    def _metric(self):
        if not self.two_sided:
            return WhitenedSVD(shrinkage=self._shrinkage)
        return KfacSVD(
            input_shrinkage=self._shrinkage,
            grad_shrinkage=self.grad_shrinkage,
            shrinkage_target=self.shrinkage_target,
        )

    def _seen(self, stats):
        gram = stats["compressed_gram" if "cross_gram" in stats else "input_gram"]
        return {"input_gram": gram} | ({"gradient_gram": stats["gradient_gram"]} if self.two_sided else {})
