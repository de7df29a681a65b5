"""Truncated singular value decomposition through the Gram matrix of the smaller side."""

import torch

from ..errors import NonFiniteError
from .blocks import columns_gram, rows_gram, times, transposed_times


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


def balanced(left, right):
    """The same product with columns of `left` and rows of `right` of equal norm, so that half precision holds both."""
    columns, rows = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((columns > 0) & (rows > 0), (rows / columns).sqrt(), 1.0)
    scale = torch.nan_to_num(scale, nan=1.0, posinf=1.0)
    return left * scale, right / scale[:, None]


def leading_eigh(symmetric, rank):
    """All eigenvalues, largest first and clamped at zero, and the `rank` leading eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), fix_signs(vectors[:, -rank:].flip(1))


def eigenvalues(symmetric):
    """All eigenvalues, largest first and clamped at zero."""
    return torch.linalg.eigvalsh(symmetric).flip(0).clamp(min=0)


def singular_energies(matrix):
    """The squared singular values of `matrix`, `(min(out, in),)`, largest first, float64."""
    require_finite(matrix, "The weight")
    return eigenvalues(rows_gram(matrix) if matrix.shape[0] <= matrix.shape[1] else columns_gram(matrix))


def product_singular_values(left, right):
    r"""The singular values of `left @ right`, largest first, without that product.

        left = Q R,    right^T = P S,    s(left @ right) = s(R S^T)

    The core `R S^T` has no more rows or columns than the rank.

    Args:
        left (`torch.Tensor`): `(out, r)`, float64.
        right (`torch.Tensor`): `(r, in)`, float64.

    Returns:
        `(min(out, r, in),)`, float64.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    require_finite(left, "The left factor")
    require_finite(right, "The right factor")
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return torch.linalg.svdvals(core)


def randomized_svd(matrix, rank, generator, oversampling=16, power_iterations=4):
    r"""A nearly best approximation of rank `rank`, from products with a few random directions.

        Q = orth((M M^T)^p M G),  G Gaussian `(in, rank + oversampling)`,    M ~ Q svd_rank(Q^T M),
        |M - M'|_F^2 = |M|_F^2 - sum_{i <= rank} s_i(Q^T M)^2

    In float64, with an orthogonalisation between any two products. Worth its error for a rank far below both sides
    only: else [`truncated_svd`] is faster too.

    Args:
        matrix (`torch.Tensor`): `(out, in)`, any floating dtype.
        rank (`int`): in `1 .. min(out, in)`.
        generator (`torch.Generator`): on the CPU, for G.
        oversampling (`int`, defaults to 16): directions beside `rank`, at least 0.
        power_iterations (`int`, defaults to 4): p, at least 0; the flatter the spectrum, the more are wanted.

    Returns:
        `(left, right, error)`: `(out, rank)` with orthonormal columns, `(rank, in)`, and the squared error; float64.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.

    Reference:
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    require_finite(matrix, "The weight")
    matrix = matrix.double()
    size = min(rank + oversampling, *matrix.shape)
    directions = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, right, energies = truncated_svd(basis.T @ matrix, rank)
    error = (matrix.square().sum() - energies[:rank].sum()).clamp(min=0)
    return basis @ left, right, error


def truncated_svd(matrix, rank):
    r"""Best approximation of rank `rank` in Frobenius norm (Eckart-Young), as two factors.

        matrix ~ left @ right,    |matrix - left @ right|_F^2 = sum_{i > rank} s_i^2

    Computed in float64 from `eigh` of the Gram matrix of the smaller side: the orthonormal factor is exact to
    rounding, only singular values below sqrt(eps) of the largest lose relative accuracy, and those carry no weight in
    a truncation.

    Args:
        matrix (`torch.Tensor`): `(out, in)`, any floating dtype.
        rank (`int`): in `1 .. min(out, in)`.

    Returns:
        `(left, right, energies)`: `(out, rank)`, `(rank, in)`, and all `min(out, in)` squared singular values,
        largest first; float64.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.
    """
    require_finite(matrix, "The weight")
    rows, columns = matrix.shape
    if rows <= columns:
        energies, left = leading_eigh(rows_gram(matrix), rank)
        return left, transposed_times(left, matrix), energies
    energies, basis = leading_eigh(columns_gram(matrix), rank)
    return times(matrix, basis), basis.T, energies
