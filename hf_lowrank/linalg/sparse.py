"""Matrices of a few single entries, by their places in the flattened matrix."""

import torch


def sparse_matrix(places, values, shape):
    """A sparse matrix `shape` with `values` `(n,)` at the flat `places` `(n,)`, which rise."""
    indices = torch.stack([places // shape[1], places % shape[1]])
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)


def flat_places(matrix):
    """The places of the entries of a coalesced sparse `matrix`, those that are zero included, int64, rising."""
    row, column = matrix.indices()
    return row * matrix.shape[1] + column


def largest_entries(matrix, count):
    """The flat places of the `count` entries of largest magnitude, rising; of equal ones the first."""
    return matrix.abs().flatten().sort(descending=True, stable=True).indices[:count].sort().values
