"""Singular values, thinned out until hundreds of layers fit into one file."""

from dataclasses import dataclass

import torch


# Singular values kept of each layer: half of them where most of the weight is, half spread over all.
POINTS = 64


@dataclass(frozen=True)
class Spectrum:
    """Some of the singular values of a weight; of one with copies, their root mean squares.

    Args:
        count (`int`): how many there are in all.
        index (`list`): which are kept, from 1, the first and the last among them.
        values (`list`): these, to six digits, largest first.
    """

    count: int
    index: list
    values: list


def spectrum_of(copies):
    """The [`Spectrum`] of a weight from the singular values of its copies, tensors of one length, largest first."""
    values = torch.stack(copies).square().mean(0).sqrt().tolist()
    steps = [i / (POINTS // 2 - 1) for i in range(POINTS // 2)]
    index = sorted({round(len(values) ** s) for s in steps} | {round(1 + s * (len(values) - 1)) for s in steps})
    return Spectrum(len(values), index, [float(f"{values[i - 1]:.6g}") for i in index])
