"""Tucker decomposition of tensors of any order, by a singular value decomposition of every unfolding."""

import torch

from .blocks import rows_gram
from .svd import leading_eigh, require_finite


def hosvd(tensor, ranks):
    r"""Truncated higher-order singular value decomposition.

        T ~ G x_1 U_1 x_2 U_2 ..,    U_k = the r_k leading left singular vectors of T unfolded along k,
        G = T x_1 U_1^T x_2 U_2^T ..,    |T - T'|_F^2 = |T|_F^2 - |G|_F^2 <= sum_k sum_{i > r_k} s_{k,i}^2

    Exact at full ranks; no decomposition of these ranks is closer by more than the square root of the order. Of a
    matrix at equal ranks it is the truncated SVD, with `G = diag(s)`.

    Args:
        tensor (`torch.Tensor`): of any order, any floating dtype.
        ranks (`tuple[int]`): one a mode, in `1 .. size`.

    Returns:
        `(core, bases)`: `(r_1, r_2, ..)`, and matrices `(size_k, r_k)` with orthonormal columns; float64.

    Raises:
        NonFiniteError: `tensor` holds NaN or infinity.

    Reference:
        De Lathauwer, De Moor and Vandewalle, "A multilinear singular value decomposition", SIMAX 2000.
    """
    require_finite(tensor, "The weight")
    core, bases = tensor.double(), []
    for mode, rank in enumerate(ranks):
        _, basis = leading_eigh(rows_gram(tensor.movedim(mode, 0).flatten(1)), rank)
        bases.append(basis)
    for mode, basis in enumerate(bases):
        core = _along(core, basis.T, mode)
    return core, bases


def tucker_tensor(core, bases):
    """The tensor that a core and a basis a mode stand for."""
    for mode, basis in enumerate(bases):
        core = _along(core, basis, mode)
    return core


def _along(tensor, matrix, mode):
    """`tensor` with `matrix` multiplied to one mode."""
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
