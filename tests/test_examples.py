"""Examples run, and README says what they do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "examples")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.real
def test_quickstart():
    sys.path.insert(0, str(ROOT / "examples"))
    from benchmarks import setups

    if not (setups.CACHE / "smollm2-135m-instruct").is_dir():
        pytest.skip("the model is not in the cache; `make test` fetches it")
    done = run(sys.executable, "examples/quickstart.py", "--smoke")
    assert done.returncode == 0, done.stderr
    assert "logits after reloading equal, bit for bit: True" in done.stdout
    for label in ("dense", "factorized while loading", "saved and reloaded"):
        assert label in done.stdout


def test_commands_in_the_readmes_name_files_that_exist():
    for readme in ("README.md", "CONTRIBUTING.md", "examples/README.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for path in re.findall(r"(?:examples|tests)/[\w/]+\.py", text):
            assert (ROOT / path).exists(), f"{readme} names {path}"
        for target in re.findall(r"make (quickstart|test|check|style)", text):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_the_method_table_is_complete():
    import hf_lowrank

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in hf_lowrank.METHODS.names():
        assert f"| `{name}` |" in text
