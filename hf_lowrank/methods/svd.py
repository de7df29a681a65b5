from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_choice, check_integer
from ..linalg import randomized_svd, singular_energies, truncated_svd
from .base import Factors, Method, register_method


SOLVERS = ("exact", "randomized")


@register_method("svd")
@dataclass(frozen=True)
class SVD(Method):
    r"""Truncated singular value decomposition of the weight; needs no data.

        min_{rank r} |W - W'|_F^2,    W' = U_r S_r V_r^T,    minimum = sum_{i > r} S_i^2

    The cheapest method and the weakest: it knows nothing of the inputs and ruins a language model even at a gentle
    ratio. Useful as an initialisation before training, and as the baseline.

    Args:
        solver (`str`, defaults to `"exact"`): `"randomized"` comes close to the minimum with a few products
            ([`randomized_svd`]), for ranks far below both sides of the weight; error curves stay those of the minimum.
        oversampling (`int`, defaults to 16): random directions beside the rank, at least 0.
        power_iterations (`int`, defaults to 4): at least 0; each brings the randomized solver nearer to the minimum.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """

    nested: ClassVar[bool] = True
    solver: str = "exact"
    oversampling: int = 16
    power_iterations: int = 4

    def __post_init__(self):
        check_choice("solver", self.solver, SOLVERS, self.name)
        check_integer("oversampling", self.oversampling, 0, self.name)
        check_integer("power_iterations", self.power_iterations, 0, self.name)

    def factorize(self, weight, rank, stats):
        if self.solver == "exact":
            return Factors.from_energies(*truncated_svd(weight, rank))
        # The same directions for every weight of a shape: what is drawn does not depend on what was before.
        generator = torch.Generator().manual_seed(0)
        left, right, error = randomized_svd(weight, rank, generator, self.oversampling, self.power_iterations)
        total = weight.double().square().sum()
        return Factors(left, right, float((error / total).sqrt()) if total > 0 else 0.0)

    def objective(self, difference, stats):
        return difference.square().sum()

    def energies(self, weight, stats):
        return singular_energies(weight)
