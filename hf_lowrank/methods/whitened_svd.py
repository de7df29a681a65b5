from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_choice, check_number
from ..linalg import balanced, output_energies, output_optimal, psd_safe_cholesky, require_finite, shrink
from .base import Factors, Method, register_method


FORMS = ("auto", "cholesky")


@register_method("whitened_svd")
@dataclass(frozen=True)
class WhitenedSVD(Method):
    r"""Truncated SVD of the weight seen through its own inputs.

    Minimises the output error on the calibration inputs X `(tokens, in)` in closed form:

        min_{rank r} |X (W - W')^T|_F^2 = tr((W - W') C (W - W')^T),    C = X^T X,
        U = eig_r(W C W^T),    left = U,    right = U^T W,    minimum = sum_{i > r} eig_i(W C W^T).

    `form="cholesky"` computes the same optimum as the paper writes it, `C = L L^T`, `W L = U S V^T`, for comparison.

    Args:
        form (`str`, defaults to `"auto"`): `"auto"` is inverse-free and works for singular C; `"cholesky"` needs a
            positive definite C and follows the jitter ladder of [`~hf_lowrank.linalg.psd_safe_cholesky`].
        shrinkage (`float`, defaults to 0.0): fraction in [0, 1) by which C is shrunk to a multiple of the identity.

    Shapes:
        weight `(out, in)`, statistic `input_gram` `(in, in)`, left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or the Gram matrix holds NaN or infinity.
        NotPSDError: only with `form="cholesky"`, when jitter up to 1e-4 of the mean diagonal does not help.

    Reference:
        Wang et al., SVD-LLM, ICLR 2025, https://arxiv.org/abs/2403.07378.
        Differs from the authors' code: no inverse and no Cholesky factor by default, Grams and solver in float64.
    """

    statistics: ClassVar[tuple] = ("input_gram",)
    nested: ClassVar[bool] = True
    form: str = "auto"
    shrinkage: float = 0.0

    def __post_init__(self):
        check_choice("form", self.form, FORMS, self.name)
        check_number("shrinkage", self.shrinkage, 0, 1, self.name, open_high=True)

    def factorize(self, weight, rank, stats):
        gram = shrink(stats["input_gram"].double(), self.shrinkage)
        if self.form == "auto":
            return Factors.from_energies(*output_optimal(weight, gram, rank))
        require_finite(weight, "The weight")
        lower = psd_safe_cholesky(gram)
        basis, singular, rows = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
        right = torch.linalg.solve_triangular(lower, rows[:rank], upper=False, left=False)
        left, right = balanced(basis[:, :rank] * singular[:rank], right)
        return Factors.from_energies(left, right, singular**2)

    def objective(self, difference, stats):
        gram = shrink(stats["input_gram"].double(), self.shrinkage)
        return ((difference @ gram) * difference).sum()

    def energies(self, weight, stats):
        return output_energies(weight, shrink(stats["input_gram"].double(), self.shrinkage))
