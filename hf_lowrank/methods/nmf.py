from dataclasses import dataclass

import torch

from ..checks import check_integer
from ..linalg import nonnegative
from ._measured import Measured
from .base import Factors, register_method


@register_method("nmf")
@dataclass(frozen=True)
class NMF(Measured):
    r"""Factors without negative entries, of the positive and of the negative part of the weight, each by itself.

        W+ = max(W, 0) ~ L+ R+,    W- = max(-W, 0) ~ L- R-,    W ~ c [L+, -L-] [R+; R-],    all four >= 0,
        min |W+ - L+ R+|_F^2 + |W- - L- R-|_F^2

    A weight without negative entries has one part, and the rank is its own; else both share it by what they hold of
    the squared weight. Where one part is zero, the product of the other need not be: what is added there is made up
    for by c >= 0, the scale of least error, so that the result is never worse than the zero matrix. Weights of trained
    models have both signs, which a single pair cannot say: for those the error is far above that of `svd`, and only
    the parts that the components stand for are a reason to choose this. Needs scikit-learn: `pip install
    "hf-lowrank[nmf]"`.

    Args:
        iterations (`int`, defaults to 100): sweeps at most for each part, at least 1.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`. Computed in float64 on the CPU.

    Raises:
        ConfigError: an option out of range.
        MissingPackageError: scikit-learn is not installed.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        Greenformers (thesis, 2021), solver `nmf`; Lee and Seung, Nature 1999. Two parts for the two signs are
        reconstructed.
    """

    iterations: int = 100

    def __post_init__(self):
        check_integer("iterations", self.iterations, 1, self.name)

    def bound(self, rank):
        return 0

    def factorize(self, weight, rank, stats):
        wide = weight.double()
        positive, negative = wide.clamp(min=0), (-wide).clamp(min=0)
        share = self._share(positive, negative, rank)
        parts = [(1, positive, share), (-1, negative, rank - share)]
        found = [(sign, *nonnegative(part, own, self.iterations)) for sign, part, own in parts if own]
        left, right = torch.cat([sign * each for sign, each, _ in found], dim=1), torch.cat([r for _, _, r in found])
        return self.measured(wide, Factors(left * _scale(wide, left @ right), right, None))

    def _share(self, positive, negative, rank):
        """How much of the rank is for the positive part; from 2 on, each part that is not zero has some."""
        one, other = float(positive.square().sum()), float(negative.square().sum())
        if not other or not one:
            return rank if one or not other else 0
        return min(max(round(rank * one / (one + other)), rank > 1), rank - (rank > 1))


def _scale(weight, product):
    """The scale of `product`, at least 0, that comes closest to `weight`."""
    size = product.square().sum()
    return ((weight * product).sum() / size).clamp(min=0) if size > 0 else torch.ones_like(size)
