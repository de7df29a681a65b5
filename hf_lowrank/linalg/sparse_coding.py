"""Rows as combinations of few atoms of a dictionary: which atoms, and the best dictionary for given codes."""

import torch


# Numbers of the largest table that a pursuit keeps, the products of the chosen atoms of some rows with all atoms; rows
# beyond it are coded later. 32 MiB.
TABLE = 2**22


def pursue(rows, atoms, terms):
    r"""Orthogonal matching pursuit: for every row the atom that fits what is left best, `terms` times.

        min |w - s D|^2 over the s whose support grows by argmax_j |(w - s D) d_j^T| / |d_j| in every step

    With orthonormal atoms the result is the best one, the largest `terms` products, which [`strongest`] finds at once.

    Args:
        rows (`torch.Tensor`): W, `(m, n)`, float64.
        atoms (`torch.Tensor`): D, `(k, n)`, float64, of any norm; zero atoms are taken where nothing else is left.
        terms (`int`): in `1 .. k`.

    Returns:
        `(m, k)`, float64, with `terms` entries a row that may be non-zero.

    Reference:
        Rubinstein et al., "Efficient implementation of the K-SVD algorithm using batch orthogonal matching pursuit",
        2008: products of rows and atoms are formed once, and a Cholesky factor grows with the support. Differs: many
        rows at a time; the products of the orthonormalised atoms with all atoms are kept, so that a step takes one
        product with them and no solve, and one triangular solve in the end gives the codes.
    """
    gram = atoms @ atoms.T
    count = max(1, TABLE // (terms * len(atoms)))
    return torch.cat([_pursue(block @ atoms.T, gram, terms) for block in rows.split(count)])


def _pursue(products, gram, terms):
    """Codes of rows whose `products` with the atoms are `(m, k)`."""
    count, atoms = products.shape
    squares = gram.diagonal()
    norms = squares.clamp(min=0).sqrt()
    inverse = torch.where(norms > norms.max() * 1e-12, 1 / norms, 0.0)
    chosen = torch.zeros(count, atoms, dtype=torch.bool, device=products.device)
    support = torch.empty(count, terms, dtype=torch.long, device=products.device)
    # L L^T is the Gram matrix of the chosen atoms. The rows of `spans` are the products of all atoms with those of
    # L^-1 times the chosen ones, which are orthonormal; `partial` are the products of the latter with the row.
    lower, partial = products.new_zeros(count, terms, terms), products.new_zeros(count, terms, 1)
    spans, left = products.new_empty(count, terms, atoms), products.clone()
    for step in range(terms):
        fit = (left * inverse).abs_().masked_fill_(chosen, -1.0)
        best = fit.argmax(1, keepdim=True)
        chosen.scatter_(1, best, True)
        support[:, step : step + 1] = best
        row = spans[:, :step].gather(2, best[:, :, None].expand(-1, step, 1)).mT
        own = squares[best]
        rest = own - row.square().sum(2)
        # An atom that the others span already adds nothing, and stands beside them with a code of zero.
        adds = rest > 1e-10 * own
        row, pivot = row * adds[:, :, None], torch.where(adds, rest, 1.0).sqrt()
        span = torch.where(adds, (gram[best[:, 0]] - (row @ spans[:, :step])[:, 0]) / pivot, 0.0)
        value = torch.where(adds, left.gather(1, best) / pivot, 0.0)
        left -= value * span
        spans[:, step], partial[:, step] = span, value
        lower[:, step, :step], lower[:, step, step] = row[:, 0], pivot[:, 0]
    solved = torch.linalg.solve_triangular(lower.mT, partial, upper=True)
    return torch.zeros_like(products).scatter_(1, support, solved[:, :, 0])


def strongest(products, terms):
    r"""The best codes for orthonormal atoms: of the products with them, the largest of every row.

        min_S |W - S D|_F^2 over S with `terms` numbers a row, D D^T = I:    the largest entries of W D^T

    Args:
        products (`torch.Tensor`): W D^T, `(m, k)`.
        terms (`int`): in `1 .. k`.

    Returns:
        `(m, k)`, zero elsewhere.
    """
    places = products.abs().topk(terms, dim=1, sorted=False).indices
    return torch.zeros_like(products).scatter(1, places, products.gather(1, places))


def better_codes(one, other, atoms, rows):
    """For every row whichever of two codes `(m, k)` leaves less of it."""
    errors = [(rows - codes @ atoms).square().sum(1, keepdim=True) for codes in (one, other)]
    return torch.where(errors[1] < errors[0], other, one)


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


def orthonormal_atoms(rows, codes):
    r"""The orthonormal dictionary for given codes, a Procrustes problem.

        min_{D D^T = I} |W - S D|_F^2:    D = P Q^T,    P Sigma Q^T = svd(S^T W)

    Args:
        rows (`torch.Tensor`): W, `(m, n)`, float64.
        codes (`torch.Tensor`): S, `(m, k)`, float64, `k <= n`.

    Returns:
        `(k, n)`, with orthonormal rows whatever the rank of the codes.

    Reference:
        Schoenemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    left, _, right = torch.linalg.svd(codes.T @ rows, full_matrices=False)
    return left @ right


def refit_atoms(rows, codes, atoms, iterations):
    r"""One sweep of K-SVD: each atom in turn, and the codes with it, by the leading singular pair of what it is for.

        Omega_i = rows with atom i,    E_i = (W - S D + s_i d_i) on Omega_i,    min_{s_i, d_i} |E_i - s_i d_i|_F^2

    The pair comes out of a power iteration that starts at the old atom, so that the error falls or stays with every
    atom, however few the iterations. An atom that no row has is left alone, and supports never grow.

    Args:
        rows (`torch.Tensor`): W, `(m, n)`, float64.
        codes (`torch.Tensor`): S, `(m, k)`, float64.
        atoms (`torch.Tensor`): D, `(k, n)`, float64.
        iterations (`int`): products with `E_i^T E_i` an atom, 0 or more.

    Returns:
        `(codes, atoms)`, new; atoms that some row has are of norm 1.

    Reference:
        Aharon et al., "K-SVD: an algorithm for designing overcomplete dictionaries for sparse representation", IEEE
        Transactions on Signal Processing 2006. Differs: a power iteration for the singular pair.
    """
    codes, atoms = codes.clone(), atoms.clone()
    left = rows - codes @ atoms
    for index in range(len(atoms)):
        users = codes[:, index].nonzero()[:, 0]
        atom = atoms[index]
        if len(users) == 0 or not atom.any():
            continue
        own = left[users] + codes[users, index, None] * atom
        atom = atom / atom.norm()
        values = own @ atom
        # From an atom that fits nothing that is left, the iteration leads nowhere.
        for _ in range(iterations if values.any() else 0):
            image = values @ own
            atom = image / image.norm()
            values = own @ atom
        codes[users, index], atoms[index] = values, atom
        left[users] = own - values[:, None] * atom
    return codes, atoms
