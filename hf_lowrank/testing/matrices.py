"""Matrices with a chosen spectrum and a chosen kind of degeneracy."""

import torch


DEGENERACIES = ("none", "low_rank", "zero", "duplicated_rows", "flat")


def make_weight(rows, columns, decay=0.9, degeneracy="none", seed=0):
    """A float64 weight `(rows, columns)` with singular values `decay**i`.

    Args:
        rows (`int`): out features.
        columns (`int`): in features.
        decay (`float`, defaults to 0.9): ratio of neighbouring singular values, in (0, 1].
        degeneracy (`str`, defaults to `"none"`): `"low_rank"` (half the rank), `"zero"`,
            `"duplicated_rows"`, or `"flat"` (all singular values are 1).
        seed (`int`, defaults to 0): of the random singular vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    values = decay ** torch.arange(size, dtype=torch.float64)
    if degeneracy == "low_rank":
        values[size // 2 :] = 0
    elif degeneracy == "zero":
        values[:] = 0
    elif degeneracy == "flat":
        values[:] = 1
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64)).Q
    weight = (u * values) @ v.T
    if degeneracy == "duplicated_rows":
        weight[rows // 2 :] = weight[: rows - rows // 2]
    return weight


def make_inputs(columns, tokens=None, condition=1e4, seed=1):
    """Float64 inputs `(tokens, columns)`, correlated and of different size.

    Args:
        columns (`int`): in features.
        tokens (`int`, *optional*): 4 times `columns` by default.
        condition (`float`, defaults to 1e4): ratio of the largest to the smallest input variance.
        seed (`int`, defaults to 1): of the random inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = condition ** (-torch.arange(columns, dtype=torch.float64) / (2 * max(columns - 1, 1)))
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    return torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64) * scales @ mixing


def make_gram(columns, tokens=None, condition=1e4, seed=1):
    """The Gram matrix `(columns, columns)` of `make_inputs`, of the same arguments; singular if `tokens < columns`."""
    inputs = make_inputs(columns, tokens, condition, seed)
    return inputs.T @ inputs
