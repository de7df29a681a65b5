"""Orthonormal dictionaries: the closed forms they contain, what budgets count, and numbers of fourteen bits."""

import pytest
import torch

from hf_lowrank import METHODS, ConfigError, DenseSparseLinear, NonFiniteError, NotPSDError, NumericalWarning
from hf_lowrank.testing import make_gram, make_weight


Compot = METHODS["compot"]
SHAPES = [(24, 40), (40, 24)]


def given(rows, columns, **options):
    return make_weight(rows, columns, decay=0.97), {"input_gram": make_gram(columns, **options)}


def whitened(weight, rank, stats):
    return METHODS["whitened_svd"]().factorize(weight, rank, stats)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["compot", "cospadi"])
def test_with_all_atoms_a_row_it_is_whitened_svd(shape, name):
    weight, stats = given(*shape)
    method = METHODS[name](rho=1, num_iters=3)
    for rank in (1, 7, 23):
        found = method.factorize(weight, rank, stats)
        expected = whitened(weight, rank, stats)
        torch.testing.assert_close(found.product(), expected.product(), rtol=0, atol=1e-10)
        assert abs(found.relative_error - expected.relative_error) < 1e-10
    torch.testing.assert_close(method.factorize(weight, 24, stats).product(), weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_atoms_are_orthonormal_where_the_inputs_are_white(shape):
    weight, stats = given(*shape)
    found = Compot().factorize(weight, 12, stats)
    lower = torch.linalg.cholesky(stats["input_gram"])
    atoms = found.right @ lower
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
    assert ((found.left != 0).sum(1) == 6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_iteration_makes_it_worse_and_it_begins_below_whitened_svd_of_as_many_terms(shape):
    weight, stats = given(*shape)
    errors = [Compot(num_iters=n).factorize(weight, 12, stats).relative_error for n in range(12)]
    assert all(after <= before * (1 + 1e-10) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] < whitened(weight, 6, stats).relative_error
    assert errors[-1] < 0.95 * errors[0]


def test_more_is_kept_than_by_two_factors_of_the_same_bytes():
    weight = make_weight(48, 64, decay=0.98)
    stats = {"input_gram": make_gram(64)}
    rank = 24
    size = DenseSparseLinear.stored_bytes(48, 64, rank, 2, nonzeros=12)
    expected = whitened(weight, size // 2 // (48 + 64), stats)
    assert Compot().factorize(weight, rank, stats).relative_error < 0.9 * expected.relative_error


@pytest.mark.parametrize("degenerate", ["few tokens", "zero channels"])
@pytest.mark.parametrize("name", ["compot", "cospadi"])
def test_a_singular_gram_follows_the_ladder_and_its_inputs_are_met(degenerate, name):
    weight = make_weight(24, 40, decay=0.97)
    gram = make_gram(40, tokens=10)
    if degenerate == "zero channels":
        gram = make_gram(40)
        gram[20:] = gram[:, 20:] = 0
    method = METHODS[name](rho=1, num_iters=2)
    with pytest.warns(NumericalWarning, match="is singular: added 1e-1"):
        found = method.factorize(weight, 22, {"input_gram": gram})
    assert torch.isfinite(found.product()).all()
    assert found.relative_error < 1e-4, "the rank is beyond that of the inputs"
    with pytest.raises(NotPSDError):
        method.factorize(weight, 4, {"input_gram": -gram})
    weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        method.factorize(weight, 4, {"input_gram": gram})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9), (torch.float32, 2**-6)])
def test_fourteen_bits_are_bounded_and_stored_without_a_second_rounding(dtype, bound):
    weight, stats = given(24, 40)
    weight = weight.to(dtype)
    full, short = (Compot(coeff_bits=bits).factorize(weight, 12, stats) for bits in (16, 14))
    change = (short.left - full.left).abs()
    assert (change <= bound * full.left.abs()).all()
    assert change.max() > 0
    assert torch.equal(short.right, full.right)
    # Atoms that are orthonormal where it counts pass the bound of the numbers on to the error.
    assert full.relative_error < short.relative_error <= full.relative_error + bound
    if dtype != torch.float32:
        layer = DenseSparseLinear.from_factors(short, dtype=dtype)
        assert not (layer.values.detach().view(torch.int16) & 3).any()
        assert layer.values.element_size() == 2, "in 16 bits all the same"


@pytest.mark.parametrize(
    ("shape", "accounting", "atoms", "terms"),
    [
        ((192, 576), "effective", 131, 65),
        ((576, 576), "effective", 307, 153),
        ((576, 576), "mask", 295, 147),
    ],
)
def test_budgets_count_what_the_papers_count_or_what_is_stored(shape, accounting, atoms, terms):
    """At 80 %: k = 0.8 n m / (n + m / 2) and, with the mask, k = 0.8 n m / (n + m / 2 + m / 16), floored."""
    (m, n), method = shape, Compot(accounting=accounting)
    budget = 0.8 * n * m
    fitting = [k for k in range(1, m) if method.counted(DenseSparseLinear, m, n, k) <= budget]
    assert (max(fitting), method.terms(max(fitting))) == (atoms, terms)
    size = DenseSparseLinear.stored_bytes(m, n, atoms, 2, nonzeros=terms)
    mask = m * -(-atoms // 8)
    assert size == 2 * (atoms * n + m * terms) + mask
    counted = 2 * method.counted(DenseSparseLinear, m, n, atoms)
    assert counted == (size + size % 2 if accounting == "mask" else size - mask)


def test_fourteen_bits_would_hold_the_mask_at_two_atoms_for_each():
    """What the effective accounting rests on: two bits a number are a bit an atom."""
    atoms, terms = 304, 152
    assert 2 * terms == atoms
    effective = Compot(accounting="effective").counted(DenseSparseLinear, 576, 576, atoms)
    assert 16 * effective == 16 * atoms * 576 + 14 * 576 * terms + 576 * atoms


def test_error_curves_of_large_weights_are_measured_at_some_ranks_and_fall_in_between():
    weight, stats = given(40, 48)
    method = Compot(num_iters=2, curve_points=4)
    curve = method.error_curve(weight, stats)
    assert curve.shape == (41,)
    for rank in (0, 1, 14, 27, 40):
        left = weight if rank == 0 else weight - method.factorize(weight, rank, stats).product()
        torch.testing.assert_close(curve[rank], method.objective(left, stats), rtol=1e-9, atol=1e-12)
    assert (curve.diff() <= 0).all()
    exact = torch.stack([method.objective(weight - method.factorize(weight, rank, stats).product(), stats)
                         for rank in range(14, 41)])  # fmt: skip
    assert ((curve[14:] / exact).log().abs() < 0.7).all(), "within a factor of two"
    assert method.error_curve(torch.zeros(40, 48), stats).eq(0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rho": 0.5}, "`rho`=0.5 of compot must be a number of at least 1"),
        ({"rho": float("inf")}, "`rho`=inf of compot"),
        ({"num_iters": -1}, "`num_iters`=-1 of compot must be an integer of at least 0"),
        ({"curve_points": 1}, "`curve_points`=1 of compot must be an integer of at least 2"),
        ({"share_layers": 0}, "`share_layers`=0 of compot must be an integer of at least 1"),
        ({"joint_groups": [["q_proj"]]}, "`joint_groups`=.* of compot must be a list of groups"),
        ({"coeff_bits": 8}, r"`coeff_bits`=8 of compot must be one of \[14, 16\]"),
        ({"accounting": "none"}, r"`accounting`='none' of compot must be one of \['mask', 'effective'\]"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        Compot(**options)
