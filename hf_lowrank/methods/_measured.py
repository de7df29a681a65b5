from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Method


@dataclass(frozen=True)
class Measured(Method):
    """What methods share whose error has no closed form: the squared error of the weight, found by factorizing.

    An error curve costs a factorization for every rank, which makes allocations slow that ask for one (`knapsack`,
    `energy`).
    """

    searches: ClassVar[bool] = True

    @staticmethod
    def measured(weight, factors):
        """`factors` with the error they leave of `weight` `(out, in)`, float64."""
        total, error = weight.norm(), (weight - factors.product()).norm()
        return replace(factors, relative_error=float(error / total) if total > 0 else 0.0)

    def objective(self, difference, stats):
        return difference.square().sum()

    def error_curve(self, weight, stats):
        wide = weight.double()
        curve = [wide.square().sum()]
        for rank in range(1, min(weight.shape) + 1):
            curve.append(self.objective(wide - self.factorize(weight, rank, stats).product(), stats))
        return torch.stack(curve)
