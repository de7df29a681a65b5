"""Modes of a tensor merged into blocks: a matrix whose rank is a number of Kronecker products, and other views."""

import math


def middle_factors(number):
    """The two factors of a positive integer that are closest to each other, the smaller one first.

    Of a prime number they are 1 and the number itself.
    """
    small = next(factor for factor in range(math.isqrt(number), 0, -1) if number % factor == 0)
    return small, number // small


def merge_modes(tensor, partition):
    r"""One dimension for every block of a partition of the modes of `tensor`; the last mode of a block runs fastest.

    A weight `(o1 o2, i1 i2)` seen as `(o1, o2, i1, i2)` and merged by `[[0, 2], [1, 3]]` is its rearrangement: there

        W = sum_r A_r kron B_r    is    sum_r vec(A_r) vec(B_r)^T,

    so that the least number of Kronecker products is a rank, and the best few of them are a truncated SVD.

    Args:
        tensor (`torch.Tensor`): `(I_0, .., I_{N-1})`.
        partition (`list[list[int]]`): blocks that hold every mode once.

    Returns:
        `(prod of the sizes in block 0, prod of those in block 1, ..)`.

    Reference:
        Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    order = [mode for block in partition for mode in block]
    return tensor.permute(order).reshape([math.prod(tensor.shape[mode] for mode in block) for block in partition])


def split_modes(merged, partition, sizes):
    """Undo [`merge_modes`], for a tensor of sizes `(I_0, .., I_{N-1})`."""
    order = [mode for block in partition for mode in block]
    return merged.reshape([sizes[mode] for mode in order]).permute([order.index(mode) for mode in range(len(sizes))])
