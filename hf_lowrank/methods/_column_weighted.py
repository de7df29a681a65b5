from dataclasses import dataclass
from typing import ClassVar

from ..linalg import column_weighted, output_energies
from .base import Factors, Method


@dataclass(frozen=True)
class ColumnWeighted(Method):
    """What methods share that weigh the input channels: a subclass says how strongly each counts."""

    nested: ClassVar[bool] = True

    def scales(self, stats):
        """The weight of each input channel, `(in,)`, at least 0, float64."""
        raise NotImplementedError

    def factorize(self, weight, rank, stats):
        return Factors.from_energies(*column_weighted(weight, self.scales(stats), rank))

    def objective(self, difference, stats):
        return (difference * self.scales(stats)).square().sum()

    def energies(self, weight, stats):
        return output_energies(weight, self.scales(stats).square())
