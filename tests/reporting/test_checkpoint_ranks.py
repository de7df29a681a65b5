"""Ranks are those of a plain singular value decomposition, from files that need no config."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import hf_lowrank
from hf_lowrank.reporting import spectra
from hf_lowrank.testing import make_weight


def energy_rank(decay, size, energy):
    """In closed form, for singular values `decay**i`."""
    total = 1 - decay ** (2 * size)
    return math.ceil(math.log(1 - energy * total) / (2 * math.log(decay)))


@pytest.fixture
def found(tmp_path):
    """`found(tensors, energy)`: what is said of each."""

    def write(tensors, **options):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
        return {entry.name: entry for entry in spectra(tmp_path, **options).matrices}

    return write


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy(found, shape, energy):
    entry = found({"a.q_proj.weight": make_weight(*shape, decay=0.8)}, energy=energy)["a.q_proj.weight"]
    assert entry.energy_rank == energy_rank(0.8, min(shape), energy)
    assert (entry.type, entry.shape, entry.full_rank, entry.dtype) == ("q_proj", shape, min(shape), "float64")
    assert entry.bytes == 8 * shape[0] * shape[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("degeneracy", "rank"), [("none", 16), ("low_rank", 8), ("duplicated_rows", 12), ("zero", 0)])
def test_numerical_rank(found, dtype, degeneracy, rank):
    weight = make_weight(24, 16, decay=0.95, degeneracy=degeneracy).to(dtype)
    entry = found({"w": weight})["w"]
    assert entry.numerical_rank == rank
    assert entry.energy_rank <= max(rank, 0)


def test_what_is_a_matrix(found, tmp_path):
    stacked = torch.stack([make_weight(8, 6, degeneracy="low_rank"), make_weight(8, 6)])
    tensors = {
        "experts.up_proj": stacked,
        "conv.weight": torch.randn(8, 6, 3),
        "norm.weight": torch.ones(8),
        "ids": torch.zeros(4, 4, dtype=torch.int64),
        "empty.weight": torch.zeros(0, 4),
    }
    entries = found(tensors)
    assert set(entries) == {"experts.up_proj"}
    assert (entries["experts.up_proj"].numerical_rank, entries["experts.up_proj"].full_rank) == (6, 6)
    assert spectra(tmp_path).other_bytes == 4 * (8 * 6 * 3 + 8) + 8 * 16


def test_types_and_tables(tmp_path):
    save_file({"0.up.weight": make_weight(8, 6), "0.down.weight": make_weight(6, 8)}, tmp_path / "a.safetensors")
    save_file({"1.up.weight": make_weight(8, 6, degeneracy="low_rank")}, tmp_path / "b.safetensors")
    result = spectra(tmp_path)
    up = next(entry for entry in result.types if entry.type == "up")
    assert (up.tensors, up.bytes, up.numerical_share) == (2, 2 * 8 * 48, 0.75)
    assert [entry.name for entry in result.matrices] == ["0.down.weight", "0.up.weight", "1.up.weight"]
    document = json.loads(json.dumps(result.to_json()))
    assert document["types"][1]["numerical_share"] == 0.75 and len(document["matrices"]) == 3
    lines = str(result).splitlines()
    assert lines[0].startswith("tensor") and "rank at 90% energy" in lines[0]
    assert lines[-1] == "3 matrices, 0.00 MiB; other tensors 0.00 MiB"
    assert any(line.split() == ["up", "2", "0.00", "75.0%", f"{up.energy_share:.1%}"] for line in lines)


def test_what_cannot_be_read(tmp_path, found):
    with pytest.raises(hf_lowrank.CheckpointError, match="There are no safetensors files in"):
        spectra(tmp_path)
    with pytest.raises(hf_lowrank.CheckpointError, match="There are no safetensors files in"):
        spectra(tmp_path / "none")
    for energy in (0, 1.5):
        with pytest.raises(hf_lowrank.ConfigError, match="`energy`=.* must be in"):
            spectra(tmp_path, energy=energy)
    with pytest.raises(hf_lowrank.NonFiniteError, match="a.weight holds 1 NaN or infinite"):
        found({"a.weight": torch.tensor([[1.0, float("inf")]])})
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(hf_lowrank.CheckpointError, match="Cannot read .*a.safetensors"):
        spectra(tmp_path)
