"""Rows of a low-rank matrix that span all others with small coefficients."""

import torch

from .svd import require_finite


# No coefficient is larger than this; every exchange of rows multiplies a determinant by at least as much, so that the
# search ends.
BOUND = 1.05


def row_basis(left):
    r"""A set of rows P of `left` from which all others R follow with coefficients of at most 1.05.

        left[R] = coefficients @ left[P],    |coefficients_ij| <= 1.05

    Starts from the pivots of an LU factorization with partial pivoting, `left[perm] = L U`. Since `U` cancels,
    `coefficients = L[r:] L[:r]^-1` exists for any `left`, also one of lower rank. While a coefficient is larger than
    the bound, its row changes places with its pivot, which is a rank-one update (local maximum of the volume).

    Args:
        left (`torch.Tensor`): `(out, r)` with `r <= out`, float64.

    Returns:
        `(pivots, others, coefficients)`: row indices `(r,)` and `(out - r,)`, each ascending, and `(out - r, r)`.

    Raises:
        NonFiniteError: `left` holds NaN or infinity.

    Reference:
        Goreinov et al., "How to find a good submatrix", 2010 (maximum volume); Gu and Eisenstat, "Efficient
        algorithms for computing a strong rank-revealing QR factorization", SIAM J. Sci. Comput. 1996 (the bound).
    """
    # No comparison with NaN holds, so that the search would not end.
    require_finite(left, "The left factor")
    rank = left.shape[1]
    permutation, lower, _ = torch.linalg.lu(left)
    order = permutation.argmax(dim=0)
    coefficients = _over(lower[rank:], lower[:rank])
    while coefficients.numel():
        flat = int(coefficients.abs().argmax())
        row, column = divmod(flat, rank)
        pivot = coefficients[row, column].clone()
        if pivot.abs() <= BOUND:
            break
        outgoing, incoming = coefficients[:, column].clone(), coefficients[row].clone()
        outgoing[row] += 1
        incoming[column] -= 1
        coefficients.addr_(outgoing, incoming / pivot, alpha=-1)
        order[rank + row], order[column] = order[column].clone(), order[rank + row].clone()
    pivots, others = order[:rank].sort().values, order[rank:].sort().values
    # Afresh from the final choice: the updates have gathered rounding.
    rows = torch.empty_like(lower)
    rows[permutation.argmax(dim=0)] = lower
    return pivots, others, _over(rows[others], rows[pivots])


def _over(rows, basis):
    """`rows @ basis^-1`."""
    return torch.linalg.solve(basis, rows, left=False)
