from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_number
from ..linalg import output_energies, output_optimal, shrink
from ._groups import check_share_layers, checked_groups
from .base import Factors, Method, register_method


@register_method("basis_sharing")
@dataclass(frozen=True)
class BasisSharing(Method):
    r"""Truncated SVD of several weights stacked on each other, which then have one factor in common.

    With `W_1 .. W_K` of a group stacked along out, and the sum of the Grams of their distinct inputs:

        min_{rank r} tr((W - W') C (W - W')^T),    W = [W_1; ..; W_K],    C = sum_l X_l^T X_l,
        U = eig_r(W C W^T),    [left_1; ..; left_K] = U,    right = U^T W,    minimum = sum_{i > r} eig_i(W C W^T).

    Linears with one input (queries, keys and values; gate and up) have one C, and the minimum is that of their outputs
    together. Between layers the sum of Grams is an approximation: the minimum is then an upper bound of the error of
    the outputs. A group takes r (in + sum_k out_k) numbers, so that a weight much smaller than its neighbours, which
    alone would break even at a low rank, becomes smaller with them. Groups are stored as `"shared_basis"`, weights
    that are in none as any other pair of factors.

    Args:
        share_layers (`int`, defaults to 2): how many neighbouring blocks share a basis, weight by weight (those of one
            name and shape); at least 1, which shares none.
        joint_groups (`list[list[str]]`, *optional*): names or dotted suffixes of linears that share a basis within a
            block, such as `[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]`; those of a group that stand
            beside each other and are targets form one. They should read the same input.
        shrinkage (`float`, defaults to 0.0): fraction in [0, 1) by which C is shrunk to a multiple of the identity.

    Shapes:
        weight `(sum_k out_k, in)`, statistic `input_gram` `(in, in)`, left `(sum_k out_k, r)`, right `(r, in)`.
        Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: a weight or a Gram matrix holds NaN or infinity.

    Reference:
        Basis Sharing (ICLR 2025, TUDa-HWAI/Basis_Sharing) between layers; Joint Rank-k, 2402.16319, within one, which
        is data-free there (details from memory). Differs: no inverse and no Cholesky factor; every targeted weight is
        shared, so that what should not be is said with `target_modules` or `exclude_modules`.
    """

    statistics: ClassVar[tuple] = ("input_gram",)
    nested: ClassVar[bool] = True
    share_layers: int = 2
    joint_groups: tuple = ()
    shrinkage: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "joint_groups", checked_groups(self))
        check_share_layers(self, "basis")
        check_number("shrinkage", self.shrinkage, 0, 1, self.name, open_high=True)

    def factorize(self, weight, rank, stats):
        return Factors.from_energies(*output_optimal(weight, self._gram(stats), rank))

    def objective(self, difference, stats):
        return ((difference @ self._gram(stats)) * difference).sum()

    def energies(self, weight, stats):
        return output_energies(weight, self._gram(stats))

    def _gram(self, stats):
        return shrink(stats["input_gram"].double(), self.shrinkage)
