"""Nobody ever gets random weights: with the package installed it loads itself, without it loading stops."""

import json

import pytest
import torch
from processes import run, run_without
from transformers import CLIPConfig, CLIPModel

from hf_lowrank import LowRankConfig, factorize
from hf_lowrank.integrations import autoload
from hf_lowrank.integrations.guard import GUARD
from hf_lowrank.testing import tiny_model


LOAD = """
import sys
import torch
from transformers import {auto}
assert "hf_lowrank" not in sys.modules
model, info = {auto}.from_pretrained({folder!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
print(type(model.get_submodule({name!r})).__name__)
print(repr(model(input_ids=torch.arange(3, 10)[None])[0].double().sum().item()))
"""
OURS = ("hf_lowrank", "_hf_lowrank_autoload")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    model, inputs = tiny_model("llama")
    model.save_pretrained(folder / "dense")
    model = type(model).from_pretrained(folder / "dense", lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    model.save_pretrained(folder / "small")
    with torch.no_grad():
        total = model(input_ids=torch.arange(3, 10)[None])[0].double().sum().item()
    return folder, total


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_a_process_that_never_imports_the_package(checkpoint, auto):
    folder, total = checkpoint
    name = "model.layers.0.self_attn.q_proj"
    done = run(LOAD.format(auto=auto, folder=str(folder / "small"), name=name))
    assert done.returncode == 0, done.stderr
    kind, value = done.stdout.split()
    assert kind == "LowRankLinear"
    assert abs(float(value) - total) < 1e-3


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"])
def test_opting_out_stops_with_an_instruction(checkpoint, auto):
    folder, _ = checkpoint
    code = LOAD.format(auto=auto, folder=str(folder / "small"), name="")
    done = run(code, HF_LOWRANK_AUTOLOAD="0")
    assert done.returncode == 1
    assert "pip install hf-lowrank" in done.stderr


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"])
def test_without_the_package_loading_stops_with_an_instruction(checkpoint, auto):
    folder, _ = checkpoint
    done = run_without(OURS, LOAD.format(auto=auto, folder=str(folder / "small"), name=""))
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert "this checkpoint is factorized, run `pip install hf-lowrank`" in done.stderr


def test_a_dense_checkpoint_is_none_of_our_business(checkpoint):
    folder, _ = checkpoint
    name = "model.layers.0.self_attn.q_proj"
    code = LOAD.format(auto="AutoModelForCausalLM", folder=str(folder / "dense"), name=name)
    done = run(code + "\nassert 'hf_lowrank' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "Linear"


def test_the_hook_costs_next_to_nothing_and_never_raises():
    code = """
import sys
import _hf_lowrank_autoload as hook
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert sum(type(f).__name__ == "Finder" for f in sys.meta_path) == 1
hook.install()
assert sum(type(f).__name__ == "Finder" for f in sys.meta_path) == 1
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_guard_is_in_the_file_and_not_in_the_model(checkpoint):
    folder, _ = checkpoint
    assert json.loads((folder / "small" / "config.json").read_text())["transformers_weights"] == GUARD
    assert "transformers_weights" not in json.loads((folder / "dense" / "config.json").read_text())


PART = """
import sys
from transformers import {part}
assert "hf_lowrank" not in sys.modules
model, info = {part}.from_pretrained({folder!r}, output_loading_info=True)
assert not info["missing_keys"], info
print(type(model.get_submodule("{prefix}encoder.layers.0.mlp.fc1")).__name__)
"""
PARTS = {"CLIPVisionModel": "", "CLIPTextModelWithProjection": "text_model."}
# The hook as it is in this tree, whatever is installed.
HOOK = """
import runpy
runpy.run_path({path!r})["install"]()
"""


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composite")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 16, **sizes}
    text = {"vocab_size": 96, "max_position_embeddings": 16, "projection_dim": 16, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    factorize(model, LowRankConfig(method="svd", rank=4)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_composite(composite, part):
    code = PART.format(part=part, folder=composite, prefix=PARTS[part])
    done = run_without(("_hf_lowrank_autoload",), HOOK.format(path=autoload.__file__) + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LowRankLinear"]
    for stopped in (run(code, HF_LOWRANK_AUTOLOAD="0"), run_without(OURS, code)):
        assert stopped.returncode == 1
        assert "pip install hf-lowrank" in stopped.stderr
