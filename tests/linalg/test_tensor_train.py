"""Chains of cores: exact at full bonds, errors that add up, gauges that change nothing."""

import math

import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import (
    balanced_modes,
    bond_cores,
    centred,
    full_bonds,
    joined_cores,
    lowered_bond,
    tensor_train,
    train_matrix,
)
from hf_lowrank.testing import make_weight


OUT, IN = (3, 4, 4), (4, 2, 5)
ROWS, COLUMNS = math.prod(OUT), math.prod(IN)


def unfolding(matrix, k):
    """`(i_1 j_1 .. i_k j_k, the others)`."""
    count = len(OUT)
    order = [axis for at in range(count) for axis in (at, count + at)]
    tensor = matrix.reshape(*OUT, *IN).permute(order)
    return tensor.reshape(math.prod(tensor.shape[: 2 * k]), -1)


def test_full_bonds_are_exact_and_no_smaller_ones_are():
    weight = make_weight(ROWS, COLUMNS, decay=0.99)
    bonds = full_bonds(OUT, IN)
    assert bonds == (12, 20)
    cores, energies = tensor_train(weight, OUT, IN, bonds)
    assert [tuple(core.shape) for core in cores] == [(1, 3, 4, 12), (12, 4, 2, 20), (20, 4, 5, 1)]
    torch.testing.assert_close(train_matrix(cores), weight, rtol=0, atol=1e-12)
    assert energies.abs().max() < 1e-20
    for k in range(2):
        smaller = [bond - (at == k) for at, bond in enumerate(bonds)]
        lost = (train_matrix(tensor_train(weight, OUT, IN, smaller)[0]) - weight).norm()
        assert lost > 1e-3


@pytest.mark.parametrize("bonds", [(3, 5), (12, 4), (1, 1), (7, 20)])
def test_squared_errors_add_up_and_are_bounded_by_the_unfoldings(bonds):
    weight = make_weight(ROWS, COLUMNS, decay=0.97)
    cores, energies = tensor_train(weight, OUT, IN, bonds)
    error = (weight - train_matrix(cores)).square().sum()
    torch.testing.assert_close(error, energies.sum(), rtol=1e-9, atol=1e-12)
    tails = [torch.linalg.svdvals(unfolding(weight, k + 1))[bond:].square().sum() for k, bond in enumerate(bonds)]
    # The first truncation is that of the whole; later ones are of what it has left.
    torch.testing.assert_close(energies[0], tails[0], rtol=1e-9, atol=1e-12)
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)


def test_an_entry_is_a_product_of_small_matrices():
    weight = make_weight(ROWS, COLUMNS)
    one, two, three = tensor_train(weight, OUT, IN, (12, 20))[0]
    row, column = (2 * 4 + 1) * 4 + 3, (3 * 2 + 1) * 5 + 4
    torch.testing.assert_close((one[:, 2, 3] @ two[:, 1, 1] @ three[:, 3, 4])[0, 0], weight[row, column])


def test_a_product_of_kronecker_factors_has_bonds_of_one():
    parts = [torch.randn(i, j, dtype=torch.float64) for i, j in zip(OUT, IN, strict=True)]
    weight = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    cores, energies = tensor_train(weight, OUT, IN, (1, 1))
    torch.testing.assert_close(train_matrix(cores), weight, rtol=0, atol=1e-12)


def test_padding_is_exact():
    weight = make_weight(ROWS - 5, COLUMNS - 3)
    cores, _ = tensor_train(weight, OUT, IN, full_bonds(OUT, IN))
    whole = train_matrix(cores)
    torch.testing.assert_close(whole[: ROWS - 5, : COLUMNS - 3], weight, rtol=0, atol=1e-12)
    assert whole[ROWS - 5 :].abs().max() < 1e-12
    assert whole[:, COLUMNS - 3 :].abs().max() < 1e-12


@pytest.mark.parametrize("degeneracy", ["low_rank", "zero", "duplicated_rows"])
def test_degenerate_weights(degeneracy):
    weight = make_weight(ROWS, COLUMNS, degeneracy=degeneracy)
    cores, _ = tensor_train(weight, OUT, IN, (6, 9))
    assert all(torch.isfinite(core).all() for core in centred(cores, 1))
    lowered = lowered_bond(cores[0], cores[1], bond_cores(cores)[0], 3)
    assert all(torch.isfinite(core).all() for core in lowered)
    weight[3, 2] = math.nan
    with pytest.raises(NonFiniteError, match="The weight holds 1 NaN"):
        tensor_train(weight, OUT, IN, (6, 9))


@pytest.mark.parametrize("centre", [0, 1, 2])
def test_the_centre_holds_the_norm(centre):
    weight = make_weight(ROWS, COLUMNS)
    cores = centred([3 * core for core in tensor_train(weight, OUT, IN, (6, 9))[0]], centre)
    torch.testing.assert_close(cores[centre].norm(), train_matrix(cores).norm())
    for k, core in enumerate(cores):
        columns = core.reshape(-1, core.shape[3]) if k < centre else core.reshape(core.shape[0], -1).T
        if k != centre:
            torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("k", [0, 1])
def test_a_bond_is_lowered_at_the_least_error_of_the_whole(k):
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 3, 4, 6), (6, 4, 2, 9), (9, 4, 5, 1)]
    # In no gauge at all.
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    whole, bond = train_matrix(cores), 4
    values = torch.linalg.svdvals(unfolding(whole, k + 1))
    roots = bond_cores(cores)[k]
    torch.testing.assert_close(torch.linalg.svdvals(roots[0] @ roots[1]), values[: shapes[k][3]], rtol=1e-9, atol=0)
    cores[k : k + 2] = lowered_bond(cores[k], cores[k + 1], roots, bond)
    assert cores[k].shape[3] == bond == cores[k + 1].shape[0]
    lost = (whole - train_matrix(cores)).square().sum()
    torch.testing.assert_close(lost, values[bond:].square().sum(), rtol=1e-9, atol=0)


def test_joined_cores_are_the_same_train():
    cores, _ = tensor_train(make_weight(ROWS, COLUMNS), OUT, IN, (5, 7))
    expected = train_matrix(cores)
    torch.testing.assert_close(train_matrix([joined_cores(*cores[:2]), cores[2]]), expected)
    torch.testing.assert_close(train_matrix([cores[0], joined_cores(*cores[1:])]), expected)


@pytest.mark.parametrize(
    ("size", "count", "modes"),
    [
        (768, 5, (3, 4, 4, 4, 4)),
        (576, 5, (3, 4, 4, 4, 3)),
        (1536, 5, (4, 4, 6, 4, 4)),
        (1024, 2, (32, 32)),
        (1, 5, (1, 1, 1, 1, 1)),
        (8, 5, (1, 2, 2, 2, 1)),
    ],
)
def test_modes_are_balanced_with_the_largest_in_the_middle(size, count, modes):
    assert balanced_modes(size, count) == modes


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_awkward_sizes_are_padded_a_little(count):
    for size in (1, 2, 7, 97, 577, 1013, 2003, 5087, 30522, 50257, 151936):
        modes = balanced_modes(size, count)
        assert len(modes) == count
        assert size <= math.prod(modes) <= 1.15 * size + 1
        assert max(modes) <= math.ceil(2 * size ** (1 / count))


@pytest.mark.parametrize(
    ("out_shape", "in_shape", "bonds", "share", "over"),
    [
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16), 0.073, 1.08),
        ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), (12, 192, 192, 12), 0.111, 1.13),
    ],
    ids=["768 x 3072", "768 x 768"],
)
def test_the_shapes_of_the_paper(out_shape, in_shape, bonds, share, over):
    """Its bonds at full rank; the central core alone is as large as the weight; the others are a tenth."""
    assert full_bonds(out_shape, in_shape) == bonds
    numbers = [d * i * j * e for d, i, j, e in zip((1, *bonds), out_shape, in_shape, (*bonds, 1), strict=True)]
    dense = math.prod(out_shape) * math.prod(in_shape)
    assert max(numbers) == numbers[2] == dense
    assert (sum(numbers) - dense) / sum(numbers) == pytest.approx(share, abs=0.001)
    assert sum(numbers) / dense == pytest.approx(over, abs=0.006)
