"""A file is there whole or not at all, and has the bytes that safetensors would write."""

import errno
import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lowrank import CheckpointError, ResourceError
from hf_lowrank.files import NAMES, enough_space, sha256_of, write_json, write_tensors, writing


def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, dtype in enumerate(NAMES):
        numbers = torch.randint(0, 2, (index + 1, 3), generator=generator).to(dtype)
        found |= {f"{index}.weight": numbers, f"ä.{index}": numbers[:1], f"none.{index}": numbers[:0]}
    return found | {"scalar": torch.tensor(3.0), "turned": torch.arange(6.0).view(2, 3).T}


def layout_of(found):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"note": '"ä"'}])
def test_the_bytes_are_those_of_safetensors(tmp_path, metadata):
    found, asked = tensors(), []

    def read(name):
        asked.append(name)
        return found[name]

    digest = write_tensors(tmp_path / "ours", layout_of(found), read, metadata)
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, tmp_path / "theirs", metadata)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert digest == sha256_of(tmp_path / "ours") == hashlib.sha256(ours).hexdigest()
    assert sorted(asked) == sorted(found), "each tensor is asked for once"
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(tmp_path / "ours").items())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.int32)])
def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path, wrong):
    with pytest.raises(CheckpointError, match=r"b turns out as torch\.\w+ \(\d,\), and .* was announced in"):
        write_tensors(
            tmp_path / "f",
            layout_of({"a": torch.zeros(2), "b": torch.zeros(2)}),
            {"a": torch.zeros(2), "b": wrong}.get,
        )
    assert not list(tmp_path.iterdir())


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"it would hold \['torch.complex128'\]; cast"):
        write_tensors(tmp_path / "f", {"a": (torch.complex128, (1,))}, None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, number):
    (tmp_path / "f").write_text("before")
    with pytest.raises(ResourceError, match=rf"Cannot write .*f: {os.strerror(number)}; free some space"):
        with writing(tmp_path / "f") as partial:
            write_json(partial, {})
            raise OSError(number, os.strerror(number))
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "before"


def test_other_errors_are_not_about_space(tmp_path):
    with pytest.raises(PermissionError), enough_space(tmp_path):
        raise PermissionError(errno.EACCES, "no")
