"""Pursuit of atoms, against the definition one row at a time, and the best dictionary for given codes."""

import pytest
import torch

from hf_lowrank.linalg import best_atoms, flat_places, largest_entries, pursue, sparse_matrix
from hf_lowrank.testing import make_weight


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(row, atoms, terms):
    """Orthogonal matching pursuit of one row, with a least-squares problem in every step."""
    support, left = [], row
    for _ in range(terms):
        fit = (atoms @ left).abs() / atoms.norm(dim=1)
        fit[support] = -1
        support.append(int(fit.argmax()))
        solved = torch.linalg.lstsq(atoms[support].T, row[:, None]).solution[:, 0]
        left = row - solved @ atoms[support]
    return torch.zeros(len(atoms), dtype=row.dtype).index_copy(0, torch.tensor(support), solved)


@pytest.mark.parametrize("terms", [1, 3, 7])
def test_it_is_the_pursuit(terms):
    rows, atoms = normal(9, 12), normal(15, 12, seed=1) * torch.logspace(-2, 2, 15, dtype=torch.float64)[:, None]
    expected = torch.stack([by_definition(row, atoms, terms) for row in rows])
    torch.testing.assert_close(pursue(rows, atoms, terms), expected, rtol=1e-8, atol=1e-8)


def test_what_is_left_is_orthogonal_to_the_atoms_of_the_row_and_falls_with_every_term():
    rows, atoms, before = normal(20, 10), normal(16, 10, seed=1), torch.inf
    for terms in range(1, 9):
        codes = pursue(rows, atoms, terms)
        assert ((codes != 0).sum(1) == terms).all()
        left = rows - codes @ atoms
        assert ((left @ atoms.T)[codes != 0]).abs().max() < 1e-12
        assert (left.norm(dim=1) < before).all()
        before = left.norm(dim=1)


def test_of_orthonormal_atoms_it_takes_the_largest_products():
    rows, atoms = normal(11, 12), torch.linalg.qr(normal(12, 12, seed=1)).Q[:8]
    codes, products = pursue(rows, atoms, 3), rows @ atoms.T
    best = products.abs().topk(3, dim=1).indices
    torch.testing.assert_close(codes, torch.zeros_like(products).scatter(1, best, products.gather(1, best)))


def test_repeated_and_empty_atoms_add_nothing():
    atom = normal(1, 6, seed=1)
    atoms = torch.cat([atom, 2 * atom, torch.zeros(2, 6, dtype=torch.float64)])
    rows = normal(4, 6)
    for terms in (1, 2, 4):
        codes = pursue(rows, atoms, terms)
        assert torch.isfinite(codes).all()
        torch.testing.assert_close(codes @ atoms, rows @ atom.T @ atom / atom.square().sum())
    assert not pursue(torch.zeros_like(rows), torch.zeros_like(atoms), 3).any()


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows, atoms = normal(10, 6), normal(8, 6, seed=1)
    whole = pursue(rows, atoms, 3)
    monkeypatch.setattr("hf_lowrank.linalg.sparse_coding.ROWS", 4)
    torch.testing.assert_close(pursue(rows, atoms, 3), whole, rtol=1e-12, atol=1e-12)


def test_the_best_dictionary_is_the_least_squares_one():
    rows, codes = normal(20, 9), normal(20, 6, seed=1) * (normal(20, 6, seed=2) > 0)
    codes[:, 4], codes[:, 5] = 0, 2 * codes[:, 0]
    atoms = best_atoms(rows, codes)
    assert ((rows - codes @ atoms).T @ codes).abs().max() < 1e-12, "no other is better"
    assert not atoms[4].any()
    torch.testing.assert_close(atoms[5], 2 * atoms[0])


def test_entries_by_place():
    weight = make_weight(5, 7)
    places = largest_entries(weight, 6)
    assert torch.equal(places, weight.abs().flatten().topk(6).indices.sort().values)
    matrix = sparse_matrix(places, weight.flatten()[places], weight.shape)
    assert torch.equal(flat_places(matrix), places)
    kept = torch.zeros(35, dtype=torch.bool).index_fill(0, places, True).view(5, 7)
    assert torch.equal(matrix.to_dense(), torch.where(kept, weight, 0.0))
    assert torch.equal(largest_entries(torch.zeros(3, 3), 2), torch.tensor([0, 1])), "of equal ones the first"
