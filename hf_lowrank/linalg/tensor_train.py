"""Chains of small tensors that stand for a matrix: modes, bonds, decomposition, gauges, truncation."""

import functools
import math

import torch

from .psd import psd_sqrt
from .svd import fix_signs, require_finite, truncated_svd


def balanced_modes(size, count):
    """Factors of `size`, or of the next number above it that has good ones, the largest in the middle.

    No factor exceeds twice the `count`-th root, rounded up; of the ways to factor a number, the one with the smallest
    largest factor is taken, then the one with the largest smallest.

    Args:
        size (`int`): at least 1.
        count (`int`): how many factors, at least 1.

    Returns:
        `tuple[int]`, whose product is `size` or a little more: what is beyond is to be padded with zeros.
    """
    padded, limit = size, math.ceil(2 * size ** (1 / count))
    while (found := _factors(padded, count, limit)) is None:
        padded += 1
    # The smallest outside, in turn left and right.
    return (*found[::2], *reversed(found[1::2]))


@functools.lru_cache(maxsize=1024)
def _factors(size, count, limit, least=1):
    """The most even of the rising tuples of `count` factors of `size` in `least .. limit`, or `None`."""
    if count == 1:
        return (size,) if least <= size <= limit else None
    found = []
    for first in range(least, min(limit, math.isqrt(size)) + 1):
        if size % first == 0 and (rest := _factors(size // first, count - 1, limit, first)) is not None:
            found.append((first, *rest))
    return min(found, key=lambda modes: (modes[-1], -modes[0], modes), default=None)


def full_bonds(out_shape, in_shape):
    """The bonds at which a train holds any matrix: `min(prod_{l <= k} i_l j_l, prod_{l > k} i_l j_l)` for each k."""
    sizes = [i * j for i, j in zip(out_shape, in_shape, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def tensor_train(matrix, out_shape, in_shape, bonds):
    r"""A matrix as a chain of cores, by singular value decompositions from left to right (TT-SVD).

        matrix[i_1 .. i_n, j_1 .. j_n] ~ T_1[i_1, j_1] T_2[i_2, j_2] .. T_n[i_n, j_n],    T_k[i, j] (d_{k-1}, d_k)
        |matrix - train|_F^2 = sum_k e_k^2,    e_k^2 = squared singular values that the k-th truncation leaves out

    Every core but the last is orthogonal, which is why squared errors add up. At the bonds of [`full_bonds`] nothing
    is left out. No train of these bonds is closer by more than a factor of sqrt(n - 1).

    Args:
        matrix (`torch.Tensor`): `(out, in)`, any floating dtype; padded with zeros to the products of the shapes.
        out_shape (`tuple[int]`): n modes of the rows, the first the slowest.
        in_shape (`tuple[int]`): n modes of the columns.
        bonds (`tuple[int]`): n - 1, none above its full one.

    Returns:
        `(cores, energies)`: n tensors `(d_{k-1}, i_k, j_k, d_k)`, with 1 at both ends, and the n - 1 numbers e_k^2;
        float64.

    Raises:
        NonFiniteError: `matrix` holds NaN or infinity.

    Reference:
        Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 2011; of matrices (MPO), MPOP, ACL 2021.
    """
    require_finite(matrix, "The weight")
    rows, columns = math.prod(out_shape), math.prod(in_shape)
    rest = matrix.new_zeros(rows, columns, dtype=torch.float64)
    rest[: matrix.shape[0], : matrix.shape[1]] = matrix
    count = len(out_shape)
    # (i_1, j_1, i_2, j_2, ..)
    order = [axis for k in range(count) for axis in (k, count + k)]
    rest = rest.view(*out_shape, *in_shape).permute(order).reshape(1, -1)
    cores, energies = [], []
    for k, bond in enumerate(bonds):
        before, size = rest.shape[0], out_shape[k] * in_shape[k]
        left, rest, left_out = _orthogonal_svd(rest.reshape(before * size, -1), bond)
        cores.append(left.view(before, out_shape[k], in_shape[k], bond))
        energies.append(left_out)
    cores.append(rest.reshape(-1, out_shape[-1], in_shape[-1], 1))
    return cores, torch.stack(energies)


def _orthogonal_svd(matrix, rank):
    """`(left with orthonormal columns, right, energy that is left out)`."""
    left, right, energies = truncated_svd(matrix, rank)
    if matrix.shape[0] > matrix.shape[1]:
        # There, `right` is the orthonormal one.
        norms = left.norm(dim=0)
        left, right = left / torch.where(norms > 0, norms, 1.0), norms[:, None] * right
    return left, right, energies[rank:].sum()


def train_matrix(cores):
    """The matrix that a train stands for, in the dtype of its cores, `(prod i_k, prod j_k)`."""
    whole = cores[0]
    for core in cores[1:]:
        whole = joined_cores(whole, core)
    return whole.reshape(whole.shape[1:3])


def joined_cores(left, right):
    """Two neighbouring cores `(a, i, j, d)` and `(d, k, l, b)` as one, `(a, i k, j l, b)`."""
    (a, i, j, d), (_, k, l, b) = left.shape, right.shape  # noqa: E741
    product = left.reshape(a * i * j, d) @ right.reshape(d, k * l * b)
    return product.view(a, i, j, k, l, b).permute(0, 1, 3, 2, 4, 5).reshape(a, i * k, j * l, b)


def centred(cores, centre):
    """The same train with all cores orthogonal but the one at `centre`, whose norm is that of the whole.

    Args:
        cores (`list[torch.Tensor]`): float64, of bonds that are no larger than the cores beside them allow.
        centre (`int`): from 0.
    """
    cores = list(cores)
    for k in range(centre):
        shape = cores[k].shape
        basis, triangle = torch.linalg.qr(cores[k].reshape(-1, shape[3]))
        cores[k] = basis.view(shape)
        cores[k + 1] = torch.tensordot(triangle, cores[k + 1], dims=1)
    for k in range(len(cores) - 1, centre, -1):
        shape = cores[k].shape
        basis, triangle = torch.linalg.qr(cores[k].reshape(shape[0], -1).T)
        cores[k] = basis.T.reshape(shape)
        cores[k - 1] = torch.tensordot(cores[k - 1], triangle.T, dims=1)
    return cores


def bond_cores(cores):
    r"""What every bond carries, and how to lower it without touching more than the two cores beside it.

    With `P_k = T_1 .. T_k` `(.., d_k)` and `Q_k = T_{k+1} .. T_n` `(d_k, ..)`, the roots `l_k^T l_k = P_k^T P_k` and
    `r_k r_k^T = Q_k Q_k^T` give `svd(l_k r_k)`, whose singular values are those of the unfolding at the bond.

    Args:
        cores (`list[torch.Tensor]`): float64.

    Returns:
        A list of `(l_k, r_k)`, each `(d_k, d_k)`, one a bond.
    """
    lefts, rights = [], []
    gram = cores[0].new_ones(1, 1)
    for core in cores[:-1]:
        carried = torch.tensordot(gram, core, dims=1)
        gram = core.reshape(-1, core.shape[3]).T @ carried.reshape(-1, core.shape[3])
        lefts.append(gram)
    gram = cores[-1].new_ones(1, 1)
    for core in reversed(cores[1:]):
        carried = torch.tensordot(core, gram, dims=1)
        gram = carried.reshape(core.shape[0], -1) @ core.reshape(core.shape[0], -1).T
        rights.append(gram)
    return [(psd_sqrt(left).T, psd_sqrt(right)) for left, right in zip(lefts, reversed(rights), strict=True)]


def lowered_bond(left, right, roots, bond):
    r"""Two neighbouring cores with the bond between them lowered, at the least error of the whole.

        l r = U S V^T,    T_k' = T_k r V_b S_b^{-1/2},    T_{k+1}' = S_b^{-1/2} U_b^T l T_{k+1},
        |train - train'|_F^2 = sum_{i > b} S_i^2

    Args:
        left (`torch.Tensor`): `(d_{k-1}, i_k, j_k, d_k)`, float64.
        right (`torch.Tensor`): `(d_k, i_{k+1}, j_{k+1}, d_{k+1})`, float64.
        roots (`tuple`): `(l, r)`, of [`bond_cores`].
        bond (`int`): in `1 .. d_k`.

    Returns:
        The two cores, of that bond.
    """
    found, values, rows = torch.linalg.svd(roots[0] @ roots[1])
    basis = fix_signs(found)
    rows = (basis * found).sum(0).sign()[:, None] * rows
    # What is rounding would be blown up.
    live = values[:bond] > torch.finfo(values.dtype).eps * len(values) * values[0]
    scale = torch.where(live, values[:bond].rsqrt(), 0.0)
    return (
        torch.tensordot(left, roots[1] @ rows[:bond].T * scale, dims=1),
        torch.tensordot(scale[:, None] * basis[:, :bond].T @ roots[0], right, dims=1),
    )
