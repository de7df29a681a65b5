"""What `pip install .` leaves behind: the package, its templates, the start-up hook and the plugin for vLLM."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import run_without


ROOT = Path(__file__).resolve().parents[1]
USE = """
import sys, site
sys.path[:0] = [{installed!r}]
site.addsitedir({installed!r})
from transformers import AutoModelForCausalLM
assert "hf_lowrank" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({checkpoint!r})
import hf_lowrank
assert hf_lowrank.__file__.startswith({installed!r})
print(hf_lowrank.model_card(model, "me/small").content)
"""


def test_a_wheel(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_lowrank").rglob("*.py")}
    assert sources <= names
    assert {"_hf_lowrank_autoload.py", "_hf_lowrank_autoload.pth"} <= names
    assert "optimum/commands/register/register_hf_lowrank.py" in names
    (entry_points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    described = configparser.ConfigParser()
    described.read(entry_points)
    module, _, function = described["vllm.general_plugins"]["lowrank"].partition(":")
    beside = {name.removeprefix(f"{module}/") for name in names if name.startswith(f"{module}/")}
    folder = ROOT / "hf_lowrank" / "integrations" / "vllm"
    assert beside == {path.name for path in folder.glob("*.py")}
    assert f"def {function}()" in (tmp_path / "installed" / module / "__init__.py").read_text(encoding="utf-8")
    checkpoint = str(ROOT / "tests" / "checkpoints" / "low_rank_v1")
    done = run_without((), USE.format(installed=str(tmp_path / "installed"), checkpoint=checkpoint), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "## Low-rank factors" in done.stdout
