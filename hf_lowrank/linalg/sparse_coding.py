"""Rows as combinations of few atoms of a dictionary: pursuit of the atoms, and the best dictionary for given codes."""

import torch


# Rows coded at once: the pursuit keeps a square matrix of its size for each row.
ROWS = 512


def pursue(rows, atoms, terms):
    r"""Orthogonal matching pursuit: for every row the atom that fits what is left best, `terms` times.

        min |w - s D|^2 over the s whose support grows by argmax_j |(w - s D) d_j^T| / |d_j| in every step

    With orthonormal atoms the result is the best one, the largest `terms` products.

    Args:
        rows (`torch.Tensor`): `(m, n)`, float64.
        atoms (`torch.Tensor`): D, `(k, n)`, float64, of any norm; zero atoms are taken where nothing else is left.
        terms (`int`): in `1 .. k`.

    Returns:
        `(m, k)`, float64, with `terms` entries a row that may be non-zero.

    Reference:
        Rubinstein et al., "Efficient implementation of the K-SVD algorithm using batch orthogonal matching pursuit",
        2008: products of rows and atoms are formed once, and a Cholesky factor grows with the support.
    """
    gram = atoms @ atoms.T
    return torch.cat([_pursue(block @ atoms.T, gram, terms) for block in rows.split(ROWS)])


def _pursue(products, gram, terms):
    """Codes of rows whose `products` with the atoms are `(m, k)`."""
    count, atoms = products.shape
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > norms.max() * 1e-12, 1 / norms, 0.0)
    chosen = torch.zeros(count, atoms, dtype=torch.bool, device=products.device)
    support = torch.empty(count, 0, dtype=torch.long, device=products.device)
    # L L^T is the Gram matrix of the chosen atoms, and L^-1 times their products is kept beside it.
    lower, partial = products.new_zeros(count, terms, terms), products.new_zeros(count, terms, 1)
    codes = torch.zeros_like(products)
    for step in range(terms):
        fit = ((products - codes @ gram) * inverse).abs().masked_fill(chosen, -1.0)
        best = fit.argmax(1, keepdim=True)
        chosen.scatter_(1, best, True)
        row = gram[best, support][:, :, None] if step else products.new_empty(count, 0, 1)
        row = torch.linalg.solve_triangular(lower[:, :step, :step], row, upper=False)
        own = gram.diagonal()[best]
        left = own - row.square().sum(1)
        # An atom that the others span already adds nothing, and stands beside them with a code of zero.
        adds = left > 1e-10 * own
        row, pivot = row * adds[:, :, None], torch.where(adds, left, 1.0).sqrt()
        value = (products.gather(1, best) - (row * partial[:, :step]).sum(1)) / pivot
        lower[:, step, :step], lower[:, step, step] = row[:, :, 0], pivot[:, 0]
        partial[:, step] = torch.where(adds, value, 0.0)
        support = torch.cat([support, best], dim=1)
        size = step + 1
        solved = torch.linalg.solve_triangular(lower[:, :size, :size].mT, partial[:, :size], upper=True)
        codes = torch.zeros_like(products).scatter(1, support, solved[:, :, 0])
    return codes


def best_atoms(rows, codes):
    r"""The dictionary for given codes, `min_D |W - S D|_F^2`; the one of least norm where several are best.

    Args:
        rows (`torch.Tensor`): W, `(m, n)`, float64.
        codes (`torch.Tensor`): S, `(m, k)`, float64.

    Returns:
        `(k, n)`; an atom that no row uses is zero.
    """
    left, values, right = torch.linalg.svd(codes, full_matrices=False)
    kept = values > values[0] * max(codes.shape) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / values, 0.0)
    return right.T @ (inverse[:, None] * (left.T @ rows))
