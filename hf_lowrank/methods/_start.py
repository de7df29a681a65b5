"""Where training from scratch begins, for methods that draw their factors."""

import torch


def uniform(generator, bound, *size):
    """Numbers of `U(-bound, bound)`, float64, on the CPU."""
    return (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1) * bound


def drawn_right(generator, rank, in_features):
    """`right` of a start, `(r, in)`, as a new `nn.Linear` draws its weight."""
    return uniform(generator, in_features**-0.5, rank, in_features)


def drawn_left(generator, out_features, rank):
    """`left` `(out, r)` with which the product has the variance of a new `nn.Linear`, 1 / (3 in)."""
    return uniform(generator, (3 / rank) ** 0.5, out_features, rank)
