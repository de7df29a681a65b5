"""Every checkpoint ever published still loads, and still says the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import FORMATS, summary


FOLDERS = sorted((Path(__file__).parent / "checkpoints").iterdir())
INPUT = [[3, 1, 4, 1, 5]]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_and_computes_what_it_did(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {row.format for row in summary(model).rows} == {folder.name.rpartition("_v")[0]}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(INPUT)).logits
    expected = [float(line) for line in (folder / "logits.txt").read_text().split()]
    torch.testing.assert_close(logits.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_every_format_has_one():
    assert {folder.name.rpartition("_v")[0] for folder in FOLDERS} == {*FORMATS.names(), "dense"}
