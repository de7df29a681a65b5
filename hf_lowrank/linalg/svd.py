"""Truncated singular value decomposition through the Gram matrix of the smaller side."""

import torch

from ..errors import NonFiniteError


def require_finite(tensor, what):
    """Raise [`NonFiniteError`] if `tensor` holds NaN or infinity; `what` names it in the message."""
    # A sum is finite only if all terms are (or overflow, which the exact count below then clears).
    if torch.isfinite(tensor.sum()):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NonFiniteError(
            f"{what} holds {bad} NaN or infinite value(s) of {tensor.numel()}; repair it, or leave it out with "
            "`exclude_modules`."
        )


def fix_signs(columns):
    """Flip columns so that the largest entry of each is positive: signs no longer depend on the solver."""
    largest = columns.abs().argmax(dim=0, keepdim=True)
    signs = columns.gather(0, largest).sign()
    return columns * torch.where(signs == 0, torch.ones_like(signs), signs)


def descending_eigh(symmetric):
    """Eigenvalues, largest first and clamped at zero, with their eigenvectors as columns of fixed sign."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), fix_signs(vectors.flip(1))


def truncated_svd(matrix, rank):
    r"""Best approximation of rank `rank` in Frobenius norm (Eckart-Young), as two factors.

        matrix ~ left @ right,    |matrix - left @ right|_F^2 = sum_{i > rank} s_i^2

    Computed from `eigh` of the Gram matrix of the smaller side, in the dtype of `matrix`: the orthonormal factor is
    exact to rounding, only singular values below sqrt(eps) of the largest lose relative accuracy, and those carry no
    weight in a truncation.

    Args:
        matrix (`torch.Tensor`): `(out, in)`, float64 unless the caller knows better.
        rank (`int`): in `1 .. min(out, in)`.

    Returns:
        `(left, right, energies)`: `(out, rank)`, `(rank, in)`, and all `min(out, in)` squared singular values,
        largest first.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.
    """
    require_finite(matrix, "The weight")
    rows, columns = matrix.shape
    if rows <= columns:
        energies, basis = descending_eigh(matrix @ matrix.T)
        left = basis[:, :rank]
        return left, left.T @ matrix, energies
    energies, basis = descending_eigh(matrix.T @ matrix)
    right = basis[:, :rank].T
    return matrix @ right.T, right, energies
