"""The nearest matrix of low rank, and the step of a nuclear norm towards it."""

import torch

from .svd import truncated_svd


def energy_rank(energies, share):
    """The lowest rank r with `sum_{i <= r} energies_i >= share sum_i energies_i`; 0 of the zero matrix.

    Args:
        energies (`torch.Tensor`): squared singular values, largest first.
        share (`float`): in (0, 1].
    """
    kept = energies.cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1 if kept[-1] > 0 else 0


def low_rank_projection(matrix, rank_of, shrink=0.0):
    r"""The best approximation of a matrix whose singular values have been lowered, and what the norm points along.

        U S V^T = svd(matrix),    S' = max(S - shrink, 0),    U_r S'_r V_r^T,    U_r V_r^T

    The first is the proximal step of `shrink` times the nuclear norm, cut at rank r; the second is a subgradient of
    that norm at the first, if r is its rank.

    Args:
        matrix (`torch.Tensor`): `(out, in)`, any floating dtype.
        rank_of (`Callable[[torch.Tensor], int]`): r, of the squares of S', largest first.
        shrink (`float`, defaults to 0.0): at least 0.

    Returns:
        `(projected, direction, rank)`: `(out, in)` both, float64.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.
    """
    left, right, energies = truncated_svd(matrix, min(matrix.shape))
    values = energies.sqrt()
    lowered = (values - shrink).clamp(min=0)
    rank = rank_of(lowered.square())
    # One of the factors holds the singular values, which one depends on the shape.
    unit = left[:, :rank] * torch.where(values > 0, values.reciprocal(), 0.0)[:rank]
    return (unit * lowered[:rank]) @ right[:rank], unit @ right[:rank], rank
