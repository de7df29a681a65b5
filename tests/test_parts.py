"""A part is there whole or not at all, and belongs to one run."""

import copy
import os
from pathlib import Path

import pytest
import torch

from hf_lowrank import CheckpointError
from hf_lowrank.parts import Parts, digest_of_batches, digest_of_model
from hf_lowrank.testing import ARCHITECTURES, tiny_model


def test_parts_come_back_as_they_were(tmp_path):
    parts = Parts(tmp_path, {"seed": 0})
    assert parts.facts is None
    parts.begin({"blocks": ["a"]})
    row = torch.arange(6.0)
    tensors = {"row": row, "view": row.view(2, 3).T, "same": row, "wide": row[:1].expand(4), "none": row[:0]}
    parts.write("a.b", tensors, [1, None, float("inf")])
    assert "a.b" in parts
    found, note = Parts(tmp_path, {"seed": 0}).read("a.b")
    assert note == [1, None, float("inf")]
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert Parts(tmp_path, {"seed": 0}).facts == {"blocks": ["a"]}
    assert parts.size() == sum(path.stat().st_size for path in tmp_path.iterdir())
    parts.remove("a.b")
    parts.remove("a.b")
    assert "a.b" not in parts


def test_a_write_that_fails_leaves_nothing_and_the_part_before_it(tmp_path, monkeypatch):
    parts = Parts(tmp_path, {})
    parts.write("a", {"x": torch.zeros(3)})

    def fails(source, target):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            parts.write("a", {"x": torch.ones(3)})
        with pytest.raises(OSError, match="no space left"):
            parts.begin({})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(parts.read("a")[0]["x"], torch.zeros(3))


def test_what_a_killed_run_had_begun_is_removed_and_nothing_else(tmp_path):
    for name in ("a.safetensors.partial", "manifest.json.partial", "mine.txt"):
        (tmp_path / name).touch()
    Parts(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_identity_is_refused_and_nothing_is_touched(tmp_path):
    Parts(tmp_path, {"seed": 0, "data": "x"}).begin({})
    (tmp_path / "a.safetensors.partial").touch()
    with pytest.raises(CheckpointError, match=r"differs in \['data', 'more'\]; repeat that run to go on with it, or"):
        Parts(tmp_path, {"seed": 0, "data": "y", "more": 1})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_or_missing_part_is_named_with_the_cure(tmp_path):
    parts = Parts(tmp_path, {})
    parts.write("a", {"x": torch.zeros(30)})
    with open(parts.path("a"), "r+b") as file:
        file.truncate(100)
    for name in ("a", "b"):
        with pytest.raises(
            CheckpointError, match=f"Cannot read .*{name}.safetensors.*give an empty `folder`, or remove"
        ):
            parts.read(name)


def test_every_flipped_bit_is_noticed(tmp_path):
    parts = Parts(tmp_path, {})
    parts.write("a", {"x": torch.arange(3.0), "y": torch.arange(2)}, {"error": 0.5})
    whole = bytearray(Path(parts.path("a")).read_bytes())
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        Path(parts.path("a")).write_bytes(flipped)
        try:
            tensors, note = parts.read("a")
        except CheckpointError as error:
            assert parts.path("a") in str(error)
        else:
            # The padding of the header means nothing.
            assert (list(tensors), note) == (["x", "y"], {"error": 0.5})
            assert torch.equal(tensors["x"], torch.arange(3.0)) and torch.equal(tensors["y"], torch.arange(2))
            assert whole[position : position + 1].isspace()


def test_the_digest_of_batches_sees_every_difference():
    ids = torch.arange(12)
    batches = [
        [{"input_ids": ids.view(2, 6)}],
        [{"input_ids": ids.view(3, 4)}],
        [{"input_ids": ids.view(2, 6).int()}],
        [{"inputs": ids.view(2, 6)}],
        [{"input_ids": ids[:6]}, {"input_ids": ids[6:]}],
        [{"input_ids": ids.view(2, 6), "return_dict": True}],
        [{"input_ids": ids.view(2, 6), "return_dict": False}],
    ]
    assert len({digest_of_batches(batch) for batch in batches}) == len(batches)
    again = [{"return_dict": True, "input_ids": ids.view(6, 2).T.contiguous().T.reshape(2, 6).clone()}]
    assert digest_of_batches(again) == digest_of_batches(batches[5])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_digest_of_a_model_is_that_of_its_checkpoint(architecture, tmp_path):
    model, inputs = tiny_model(architecture)
    before = digest_of_model(model)
    with torch.no_grad():
        model(**inputs())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert digest_of_model(model) == digest_of_model(copy.deepcopy(model)) == before
    config = {key: (value, again.config.to_dict()[key]) for key, value in model.config.to_dict().items()}
    assert digest_of_model(again) == before, {key: values for key, values in config.items() if values[0] != values[1]}
    parameter = list(model.parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] += 1
    changed = digest_of_model(model)
    model.config.initializer_range = 0.5
    assert len({before, changed, digest_of_model(model)}) == 3
