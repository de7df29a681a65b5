"""Few atoms a row: how supports are stored, and that blocks and masks change nothing but the size."""

import pytest
import torch
from torch import nn

from hf_lowrank import CheckpointError, DenseSparseLinear, RankError
from hf_lowrank.formats._row_supports import pack_supports, support_kind, unpack_mask
from hf_lowrank.linalg import largest_entries
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.testing import check_format, make_weight


def factors(rows, columns, rank, nonzeros=None, blocks=1):
    """A sparse table times a dictionary; with all atoms and one block, those of the whole weight at full rank."""
    nonzeros = rank if nonzeros is None else min(nonzeros, rank)
    layout = {"nonzeros": nonzeros, "blocks": blocks}
    u, s, v = torch.linalg.svd(make_weight(rows, columns), full_matrices=False)
    if (nonzeros, blocks) == (rank, 1):
        return Factors(u[:, :rank] * s[:rank], v[:rank], 0.1, layout=layout)
    codes = torch.randn(rows, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    kept = torch.stack([torch.zeros(rank).index_fill(0, largest_entries(row, nonzeros), 1) for row in codes])
    left = torch.block_diag(*(codes * kept).unflatten(0, (blocks, -1)))
    return Factors(left, make_weight(blocks * rank, columns, seed=1), 0.1, layout=layout)


SIZES = {"all": {}, "mask": {"nonzeros": 4}, "indices": {"nonzeros": 1}, "blocks": {"nonzeros": 3, "blocks": 2}}


def build(name, rank=12, dtype=torch.float64):
    found = factors(24, 40, rank, **SIZES[name])
    return found, DenseSparseLinear.from_factors(found, torch.linspace(-1, 1, 24), dtype)


@pytest.mark.parametrize("name", ["mask", "indices"])
def test_the_laws_of_formats(name):
    def make(rows, columns, rank):
        # The suite wants the whole weight at full rank, which only rows with all atoms can give.
        return factors(rows, columns, rank, **(SIZES[name] if rank < 24 else {}))

    check_format(DenseSparseLinear, 24, 40, 12, make=make)


@pytest.mark.parametrize("name", SIZES)
def test_the_weight_is_the_product(name):
    found, layer = build(name)
    torch.testing.assert_close(layer.dense_weight(), found.product(), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.exact_weight(), found.product(), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, 40, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ found.product().T + layer.bias, rtol=1e-12, atol=1e-12)
    again = DenseSparseLinear.from_spec(layer.spec(), 40, 24, True, device="meta", dtype=torch.float64)
    again.load_state_dict(layer.state_dict(), assign=True, strict=True)
    assert torch.equal(again(x), layer(x))
    assert torch.autograd.gradcheck(lambda values: torch.func.functional_call(layer, {"values": values}, (x[0],)),
                                    layer.values)  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_counted_to_the_last(name, dtype):
    _, layer = build(name, dtype=dtype)
    layout = {"nonzeros": layer.nonzeros, "blocks": layer.blocks}
    stored = [tensor for key, tensor in layer.state_dict().items() if key != "output_bias"]
    assert sum(t.numel() for t in stored) == DenseSparseLinear.cost(24, 40, layer.rank, **layout)
    size = sum(t.numel() * t.element_size() for t in stored)
    assert size == DenseSparseLinear.stored_bytes(24, 40, layer.rank, dtype.itemsize, **layout)


@pytest.mark.parametrize(
    ("atoms", "nonzeros", "kind"),
    [
        (128, 128, None),
        (128, 32, ("mask", torch.uint8, 16)),
        (192, 64, ("mask", torch.uint8, 24)),
        (128, 15, ("indices", torch.uint8, 15)),
        (256, 4, ("indices", torch.uint8, 4)),
        (257, 16, ("indices", torch.int16, 16)),
        (257, 17, ("mask", torch.uint8, 33)),
        (2**15 + 1, 2, ("indices", torch.int32, 2)),
    ],
)
def test_the_smaller_of_mask_and_integers(atoms, nonzeros, kind):
    assert support_kind(atoms, nonzeros) == kind


@pytest.mark.parametrize("atoms", [1, 7, 8, 9, 20])
def test_packed_bits_are_the_supports(atoms):
    rows = torch.stack([torch.randperm(atoms)[: (atoms + 1) // 2].sort().values for _ in range(5)])
    mask = pack_supports(rows, atoms)
    assert mask.shape == (5, -(-atoms // 8))
    expected = torch.zeros(5, atoms, dtype=torch.bool).scatter(1, rows, True)
    assert torch.equal(unpack_mask(mask, atoms), expected)


def test_tables_of_the_paper_at_its_bits():
    """768 x 768 in 16 bits: 128 atoms, 32 a row; an index of 7 bits each would make it 22.7 %."""
    size = DenseSparseLinear.stored_bytes(768, 768, 128, 2, nonzeros=32)
    assert size == 2 * (128 * 768 + 768 * 32) + 768 * 16
    assert size / (2 * 768 * 768) < 0.227


def test_a_row_with_fewer_atoms_is_filled_up():
    left = torch.zeros(12, 9, dtype=torch.float64)
    left[0, 5] = left[1, 2] = left[1, 3] = 1.0
    found = Factors(left, make_weight(9, 20), 0.0, layout={"nonzeros": 2})
    layer = DenseSparseLinear.from_factors(found, dtype=torch.float64)
    torch.testing.assert_close(layer.dense_weight(), found.product())
    assert layer.nonzeros == 2
    assert not layer.values[2:].any()


def test_the_dictionary_is_an_ordinary_linear_and_supports_are_no_parameters():
    _, layer = build("mask")
    assert {name: type(child) for name, child in layer.named_children()} == {"dictionary": nn.Linear}
    assert {name for name, _ in layer.named_parameters()} == {"dictionary.weight", "values", "output_bias"}
    assert layer.to(torch.bfloat16).mask.dtype == torch.uint8
    assert layer.spec() == {"format": "dense_sparse", "rank": 12, "nonzeros": 4}


def test_updates_are_appended_and_rows_stay_sparse():
    found, layer = build("mask")
    pair = make_weight(24, 2, seed=7), make_weight(2, 40, seed=8)
    weight = found.product() + pair[0] @ pair[1]
    absorb(layer, weight, updates=[pair])
    assert (layer.rank, layer.nonzeros) == (14, 6)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("entry", "value", "error"),
    [
        ("nonzeros", 0, CheckpointError),
        ("nonzeros", 4, CheckpointError),
        ("nonzeros", True, CheckpointError),
        ("blocks", 0, CheckpointError),
        ("blocks", 4, CheckpointError),
        ("blocks", 3, RankError),
    ],
)
def test_a_damaged_spec_is_refused(entry, value, error):
    spec = {"format": "dense_sparse", "rank": 3, entry: value}
    with pytest.raises(error, match="rank=3" if error is RankError else f"`{entry}`={value!r} of a dense_sparse"):
        DenseSparseLinear.from_spec(spec, 9, 6, True)
