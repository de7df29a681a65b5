"""Every checkpoint ever published still loads, and still says the same."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from make_checkpoints import logits_of

from hf_lowrank import FORMATS, summary


FOLDERS = sorted((Path(__file__).parent / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_and_computes_what_it_did(folder):
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {row.format for row in summary(model).rows} == {folder.name.rpartition("_v")[0]}
    logits = logits_of(model)
    expected = [float(line) for line in (folder / "logits.txt").read_text().split()]
    torch.testing.assert_close(logits.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_every_format_has_one():
    assert {folder.name.rpartition("_v")[0] for folder in FOLDERS} == {*FORMATS.names(), "dense"}
