"""Pursuit of atoms, against the definition one row at a time, and the best dictionary for given codes."""

import pytest
import torch

from hf_lowrank.linalg import (
    best_atoms,
    better_codes,
    flat_places,
    largest_entries,
    orthonormal_atoms,
    pursue,
    refit_atoms,
    sparse_matrix,
    strongest,
)
from hf_lowrank.testing import make_weight


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(atoms):
    return atoms / atoms.norm(dim=1, keepdim=True)


def error(rows, codes, atoms):
    return float((rows - codes @ atoms).square().sum())


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


def test_it_is_what_scikit_learn_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, atoms = normal(40, 24), unit(normal(36, 24, seed=1))
    for terms in (2, 9, 18):
        expected = linear_model.orthogonal_mp(atoms.T.numpy(), rows.T.numpy(), n_nonzero_coefs=terms).T
        torch.testing.assert_close(pursue(rows, atoms, terms), torch.tensor(expected), rtol=1e-10, atol=1e-10)


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
    torch.testing.assert_close(codes, strongest(products, 3))
    assert ((strongest(products, 3) != 0).sum(1) == 3).all()
    assert torch.equal(strongest(products, 8), products)


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
    monkeypatch.setattr("hf_lowrank.linalg.sparse_coding.TABLE", 4 * 3 * 8)
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


@pytest.mark.parametrize("rank", [8, 3])
def test_orthonormal_atoms_and_their_codes_are_each_the_best(rank):
    """Whatever the rank of the codes; none of both steps makes it worse."""
    rows = normal(30, rank) @ normal(rank, 12, seed=1)
    atoms = torch.linalg.qr(normal(12, 8, seed=2)).Q.T
    codes, errors = strongest(rows @ atoms.T, 4), []
    for _ in range(12):
        errors.append(error(rows, codes, atoms))
        atoms = orthonormal_atoms(rows, codes)
        torch.testing.assert_close(atoms @ atoms.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
        errors.append(error(rows, codes, atoms))
        for seed in range(3, 8):
            turned = torch.linalg.matrix_exp(0.05 * (normal(12, 12, seed=seed) - normal(12, 12, seed=seed).T))
            assert errors[-1] <= error(rows, codes, atoms @ turned) * (1 + 1e-12)
        codes = strongest(rows @ atoms.T, 4)
    assert all(after <= before + 1e-12 * errors[0] for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("iterations", [0, 1, 8])
def test_no_sweep_of_k_svd_makes_it_worse_and_supports_stay(iterations):
    rows, atoms = normal(40, 12), normal(16, 12, seed=1)
    codes = pursue(rows, atoms, 4)
    codes[:, 5] = 0
    before = error(rows, codes, atoms)
    for _ in range(6):
        again, refitted = refit_atoms(rows, codes, atoms, iterations)
        assert torch.equal(refitted[5], atoms[5]), "an atom that no row has"
        assert not (again[codes == 0] != 0).any()
        torch.testing.assert_close(refitted.norm(dim=1)[:5], torch.ones(5, dtype=torch.float64))
        after = error(rows, again, refitted)
        assert after <= before * (1 + 1e-12)
        codes, atoms, before = again, refitted, after


def test_an_atom_is_the_leading_singular_vector_of_what_it_is_for():
    rows, atoms = normal(20, 7), unit(normal(1, 7, seed=1))
    codes = rows @ atoms.T
    codes[10:] = 0
    codes, atoms = refit_atoms(rows, codes, atoms, 500)
    _, values, right = torch.linalg.svd(rows[:10])
    torch.testing.assert_close((atoms[0] @ right[0]).abs(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(codes.norm(), values[0])


def test_k_svd_of_what_is_met_exactly_changes_nothing():
    atoms = unit(normal(6, 9))
    codes = strongest(normal(15, 6, seed=1), 2)
    again, refitted = refit_atoms(codes @ atoms, codes, atoms, 8)
    torch.testing.assert_close(again @ refitted, codes @ atoms)
    zero = torch.zeros(15, 9, dtype=torch.float64)
    assert torch.isfinite(refit_atoms(zero, codes, atoms, 8)[1]).all()


def test_every_row_keeps_the_better_codes():
    rows, atoms = normal(12, 8), normal(10, 8, seed=1)
    one, other = pursue(rows, atoms, 3), pursue(rows, atoms, 2)
    one[::2] = 0
    found = better_codes(one, other, atoms, rows)
    assert torch.equal(found[::2], other[::2])
    assert torch.equal(found[1::2], one[1::2])
