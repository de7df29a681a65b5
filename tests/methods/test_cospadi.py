"""Dictionaries of any atoms: no sweep makes them worse, and structure that is there is found."""

import pytest
import torch

from hf_lowrank import METHODS, ConfigError, DenseSparseLinear
from hf_lowrank.testing import make_gram, make_weight


CoSpaDi, Compot = METHODS["cospadi"], METHODS["compot"]
SOLVERS = ("ksvd", "mod", "procrustes")
STATS = {"input_gram": make_gram(40)}
WHITE = {"input_gram": torch.eye(20, dtype=torch.float64)}


def planted(rows=300, columns=20, atoms=16, terms=3):
    """Rows that are combinations of three atoms each."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows, atoms, generator=generator).argsort(1)[:, :terms]
    codes = torch.randn(rows, terms, generator=generator, dtype=torch.float64)
    table = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, order, codes)
    return table @ torch.randn(atoms, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("init", ["svd", "rows"])
def test_no_sweep_makes_it_worse(solver, init):
    if (solver, init) == ("procrustes", "rows"):
        pytest.skip("refused")
    weight = make_weight(24, 40, decay=0.97)
    errors = [
        CoSpaDi(solver=solver, init=init, num_iters=sweeps).factorize(weight, 12, STATS).relative_error
        for sweeps in range(6)
    ]
    assert all(after <= before * (1 + 1e-10) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.98 * errors[0]
    if init == "svd":
        assert errors[0] < METHODS["whitened_svd"]().factorize(weight, 6, STATS).relative_error


def test_procrustes_is_compot():
    weight = make_weight(24, 40, decay=0.97)
    one = CoSpaDi(solver="procrustes", num_iters=20).factorize(weight, 12, STATS)
    other = Compot().factorize(weight, 12, STATS)
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)


def test_rows_have_so_many_numbers():
    found = CoSpaDi(rho=3, num_iters=2).factorize(make_weight(24, 40, decay=0.97), 13, STATS)
    assert ((found.left != 0).sum(1) <= 4).all()
    assert found.layout == {"nonzeros": 4}
    assert DenseSparseLinear.from_factors(found, dtype=torch.float64).nonzeros == 4


def test_the_dictionary_that_is_there_is_found_and_no_orthonormal_one_is_as_good():
    weight = planted()
    found = {
        solver: CoSpaDi(rho=16 / 3, solver=solver, init="rows" if solver == "ksvd" else "svd", num_iters=30)
        .factorize(weight, 16, WHITE).relative_error
        for solver in SOLVERS
    }  # fmt: skip
    assert found["ksvd"] < 0.6 * found["procrustes"]
    assert found["mod"] < found["procrustes"]


def test_the_seed_draws_the_first_atoms():
    weight = make_weight(24, 40, decay=0.97)
    one, again, other = (
        CoSpaDi(init="rows", num_iters=1, seed=seed).factorize(weight, 12, STATS).right for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"solver": "lars"}, r"`solver`='lars' of cospadi must be one of \['ksvd', 'mod', 'procrustes'\]"),
        ({"init": "zero"}, r"`init`='zero' of cospadi must be one of \['svd', 'rows'\]"),
        ({"init": "rows", "solver": "procrustes"}, "are not orthonormal, as `solver`='procrustes' needs them"),
        ({"power_iters": -1}, "`power_iters`=-1 of cospadi must be an integer of at least 0"),
        ({"seed": 1.5}, "`seed`=1.5 of cospadi must be an integer of at least 0"),
        ({"rho": 0}, "`rho`=0 of cospadi must be a number of at least 1"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        CoSpaDi(**options)
