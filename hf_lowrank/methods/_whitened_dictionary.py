"""What methods share that make a dictionary and sparse codes of a weight as its inputs see it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_choice, check_integer, is_number
from ..errors import ConfigError
from ..linalg import (
    balanced,
    orthonormal_atoms,
    psd_safe_cholesky,
    require_finite,
    shortened,
    strongest,
    truncated_svd,
)
from ._groups import check_share_layers, checked_groups
from .base import Factors, Method


ACCOUNTINGS = ("mask", "effective")
COEFF_BITS = (14, 16)
# Bits behind the leading one of the dtypes of two bytes.
MANTISSAS = {torch.float16: 10, torch.bfloat16: 7}
# Curves of so few ranks are measured at each.
FEW_RANKS = 32


@dataclass(frozen=True)
class WhitenedDictionary(Method):
    r"""A dictionary and codes of `W L`, `L L^T = C = X^T X`, and the way back; how they are found, subclasses say.

        min_{D, S} |(W - S D) L|_F^2 = |W L - S D_L|_F^2,    every row of S with s numbers,    D = D_L L^-1

    `D_L` are the atoms in the space of the whitened inputs, in which all atoms count alike.
    """

    statistics: ClassVar[tuple] = ("input_gram",)
    format: ClassVar[str] = "dense_sparse"
    only_format: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    rho: float = 2.0
    num_iters: int = 20
    share_layers: int = 1
    joint_groups: tuple = ()
    coeff_bits: int = 16
    accounting: str = "mask"
    curve_points: int = 8

    def __post_init__(self):
        if not is_number(self.rho) or self.rho < 1:
            raise ConfigError(
                f"`rho`={self.rho!r} of {self.name} must be a number of at least 1, the atoms for each that a row has."
            )
        check_integer("num_iters", self.num_iters, 0, self.name)
        check_integer("curve_points", self.curve_points, 2, self.name)
        object.__setattr__(self, "joint_groups", checked_groups(self))
        check_share_layers(self, "dictionary")
        check_choice("coeff_bits", self.coeff_bits, COEFF_BITS, self.name)
        check_choice("accounting", self.accounting, ACCOUNTINGS, self.name)

    def terms(self, rank):
        # The quotient may miss a whole number by a rounding.
        return max(1, int(rank / self.rho + 1e-9))

    def layout(self, out_features, in_features, rank):
        return {"nonzeros": self.terms(rank)}

    def counted(self, format, out_features, in_features, rank):
        layout = self.layout(out_features, in_features, rank)
        # In words of two bytes, which is what the two accountings are stated in.
        supports = format.stored_bytes(out_features, in_features, rank, 0, **layout)
        stored = format.stored_bytes(out_features, in_features, rank, 2, **layout)
        return (stored - supports) // 2 if self.accounting == "effective" else -(-stored // 2)

    def factorize(self, weight, rank, stats):
        require_finite(weight, "The weight")
        wide, gram = weight.double(), stats["input_gram"].double()
        # Where no input was ever seen, any factors will do: those that are near the weight.
        lower = psd_safe_cholesky(gram if gram.diagonal().any() else torch.eye(len(gram)).to(gram))
        codes, atoms = self.learn(wide @ lower, rank, self.terms(rank))
        right = torch.linalg.solve_triangular(lower, atoms, upper=False, left=False)
        codes, right = balanced(codes, right)
        if self.coeff_bits < 16:
            codes = shortened(codes, MANTISSAS.get(weight.dtype, MANTISSAS[torch.bfloat16]) - (16 - self.coeff_bits))
        total, left = self.objective(wide, stats), self.objective(wide - codes @ right, stats)
        error = float((left / total).clamp(min=0).sqrt()) if total > 0 else 0.0
        return Factors(codes, right, error, layout=self.layout(*weight.shape, rank))

    def learn(self, rows, rank, terms):
        """`(codes (m, k), atoms (k, n))` of `rows` `(m, n)`, float64, with `terms` numbers a row."""
        raise NotImplementedError

    def objective(self, difference, stats):
        return ((difference @ stats["input_gram"].double()) * difference).sum()

    def error_curve(self, weight, stats):
        wide, size = weight.double(), min(weight.shape)
        points = size if size <= FEW_RANKS else self.curve_points
        ranks = torch.linspace(1, size, min(points, size), dtype=torch.float64).round().long().unique()
        errors = [self.objective(wide, stats)]
        for rank in ranks.tolist():
            errors.append(self.objective(wide - self.factorize(weight, rank, stats).product(), stats))
        return _between(torch.cat([ranks.new_zeros(1), ranks]), torch.stack(errors), size)


def _between(ranks, errors, size):
    """Errors at all ranks `0 .. size` from those at `ranks`, along straight lines of their logarithm."""
    everywhere = torch.arange(size + 1)
    after = torch.searchsorted(ranks, everywhere).clamp(min=1)
    low, high = ranks[after - 1], ranks[after]
    share = ((everywhere - low) / (high - low)).to(errors)
    # An error of zero has no logarithm.
    logs = errors.clamp(min=1e-30 * float(errors[0]) + torch.finfo(errors.dtype).tiny).log()
    curve = (logs[after - 1] * (1 - share) + logs[after] * share).exp()
    curve[ranks] = errors
    return curve if errors[0] > 0 else torch.zeros_like(curve)


def leading_atoms(rows, rank):
    """The leading right singular vectors of `rows` `(m, n)`, `(rank, n)`: orthonormal where these are zero too."""
    # Signs and the order of a QR factor are those of its columns.
    return torch.linalg.qr(truncated_svd(rows, rank)[1].T).Q.T


def alternate_orthonormal(rows, rank, terms, iterations):
    """`(codes, atoms)` with orthonormal atoms: the best codes and the best atoms in turn, codes last."""
    atoms = leading_atoms(rows, rank)
    for _ in range(iterations):
        atoms = orthonormal_atoms(rows, strongest(rows @ atoms.T, terms))
    return strongest(rows @ atoms.T, terms), atoms
