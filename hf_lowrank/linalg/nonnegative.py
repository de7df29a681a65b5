"""Factors of which one or both have no negative entry."""

import warnings

import torch

from ..errors import ConfigError, MissingPackageError
from .svd import require_finite, truncated_svd


def nonnegative(matrix, rank, iterations=100, seed=0):
    r"""Two factors without negative entries, by coordinate descent (scikit-learn).

        min |M - L R|_F^2    over    L >= 0,  R >= 0

    From a start by the SVD of M towards a local minimum, as far as `iterations` go; deterministic. In float64 on the
    CPU.

    Args:
        matrix (`torch.Tensor`): `(out, in)` without negative entries.
        rank (`int`): in `1 .. min(out, in)`.
        iterations (`int`, defaults to 100): sweeps at most, at least 1.
        seed (`int`, defaults to 0): of the order in which coordinates are visited.

    Returns:
        `(left, right)`: `(out, rank)` and `(rank, in)`, float64, on the device of `matrix`.

    Raises:
        ConfigError: a negative entry.
        MissingPackageError: scikit-learn is not installed.
        NonFiniteError: `matrix` holds NaN or infinity.

    Reference:
        Lee and Seung, "Learning the parts of objects by non-negative matrix factorization", Nature 1999.
    """
    require_finite(matrix, "The weight")
    if (matrix < 0).any():
        raise ConfigError("A matrix with negative entries has no non-negative factors; use `semi_nonnegative`.")
    if not matrix.any():
        zeros = torch.zeros(sum(matrix.shape), rank, dtype=torch.float64, device=matrix.device)
        return zeros[: matrix.shape[0]], zeros[matrix.shape[0] :].T
    decomposition, exceptions = _sklearn()
    model = decomposition.NMF(rank, init="nndsvda", max_iter=iterations, random_state=seed)
    with warnings.catch_warnings():
        # A limit is a choice here: every sweep before it has made the error smaller.
        warnings.simplefilter("ignore", category=exceptions.ConvergenceWarning)
        left = model.fit_transform(matrix.detach().double().cpu().numpy())
    left, right = (torch.as_tensor(factor).double() for factor in (left, model.components_))
    return left.to(matrix.device), right.to(matrix.device)


def _sklearn():
    try:
        from sklearn import decomposition, exceptions
    except ImportError as error:
        raise MissingPackageError(
            "`method`='nmf' needs scikit-learn: `pip install \"hf-lowrank[nmf]\"`; 'snmf' and 'svd' do not."
        ) from error
    return decomposition, exceptions


def semi_nonnegative(matrix, rank, sweeps=20):
    r"""Two factors of which `right` has no negative entry.

        min |M - L R|_F^2    over    L,  R >= 0

    From a start that is as good as the best approximation of rank `rank - 1`, which a further row makes non-negative:

        L = [A, -A 1],    R = [B; 0] + 1 t^T,    t_j = max(0, -min_i B_ij),    L R = A B = svd_{rank - 1}(M).

    A sweep solves for L exactly and goes once through the rows of R, each the exact minimum for the others: the error
    never rises, so that it stays below that of the SVD of one rank less, and falls with the rank. In float64.

    Args:
        matrix (`torch.Tensor`): `(out, in)`, any floating dtype.
        rank (`int`): in `1 .. min(out, in)`.
        sweeps (`int`, defaults to 20): at least 0.

    Returns:
        `(left, right)`: `(out, rank)` and `(rank, in)`, float64; rows of `right` are of norm one, or zero.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.

    Reference:
        Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations", TPAMI 2010. Differs: the start of
        Gillis and Kumar, "Exact and heuristic algorithms for semi-nonnegative matrix factorization", SIAM J. Matrix
        Anal. Appl. 2015, and coordinate descent, since multiplicative updates keep zeros for ever.
    """
    require_finite(matrix, "The weight")
    matrix = matrix.double()
    if rank == 1:
        left, right = _one_sided(*truncated_svd(matrix, 1)[:2])
    else:
        basis, rows, _ = truncated_svd(matrix, rank - 1)
        shift = (-rows.min(dim=0).values).clamp(min=0)
        right = torch.cat([rows, torch.zeros_like(rows[:1])]) + shift
        left = torch.cat([basis, -basis.sum(dim=1, keepdim=True)], dim=1)
    for _ in range(sweeps):
        left, right = _unit_rows(left, right)
        left = _better_left(matrix, left, right)
        right = _descend(matrix, left, right)
    return _unit_rows(left, right)


def _one_sided(left, right):
    """Of a rank-one product, the positive or the negative part of its row, whichever holds more."""
    positive, negative = right.clamp(min=0), (-right).clamp(min=0)
    return (left, positive) if positive.norm() >= negative.norm() else (-left, negative)


def _unit_rows(left, right):
    norms = right.norm(dim=1)
    scale = torch.where(norms > 0, norms, 1.0)
    return left * scale, right / scale[:, None]


def _better_left(matrix, left, right):
    """Least squares for `left`, unless rounding in a nearly singular problem makes it worse than what is there."""
    solved = matrix @ torch.linalg.pinv(right)
    errors = [(matrix - each @ right).norm() for each in (left, solved)]
    return solved if errors[1] <= errors[0] else left


def _descend(matrix, left, right):
    """One pass of coordinate descent over the rows of `right`."""
    gram, products, right = left.T @ left, left.T @ matrix, right.clone()
    for k in range(len(right)):
        # A column of zeros has no use for any row.
        if gram[k, k] > 0:
            right[k] = (right[k] + (products[k] - gram[k] @ right) / gram[k, k]).clamp(min=0)
    return right
