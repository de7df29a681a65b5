"""vLLM finds the method by itself, in an environment where the rest of the package cannot be imported."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_without

import hf_lowrank.integrations.vllm as plugin


FOLDER = Path(plugin.__file__).parent
ROOT = Path(__file__).parents[3]
ALONE = """
import sys
sys.path[:0] = [{packages!r}, {tests!r}]
import vllm_stand_in
vllm_stand_in.install()
from _hf_lowrank_vllm import register
register()
register()
assert vllm_stand_in.QUANTIZATION_METHODS == ["lowrank"], vllm_stand_in.QUANTIZATION_METHODS
assert "_hf_lowrank_vllm.method" not in sys.modules
spec = {{"format": "low_rank", "rank": 2}}
config = vllm_stand_in.CONFIGS["lowrank"].from_config({{"version": 1, "modules": {{"a": spec}}}})
layer = vllm_stand_in.ReplicatedLinear(8, 8, quant_config=config, prefix="a")
print(type(layer.quant_method).__module__)
"""


def test_alone_without_the_package_or_transformers(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "_hf_lowrank_vllm", ignore=shutil.ignore_patterns("__pycache__"))
    code = ALONE.format(packages=str(tmp_path), tests=str(ROOT / "tests"))
    done = run_without(("hf_lowrank", "transformers", "safetensors", "peft"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "_hf_lowrank_vllm.method"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_files_import_each_other_torch_and_vllm_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            continue
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert name.partition(".")[0] in {"torch", "vllm", *sys.stdlib_module_names}, name


def test_registering_again_is_no_second_method(vllm):
    plugin.register()
    assert vllm.QUANTIZATION_METHODS == ["lowrank"]
