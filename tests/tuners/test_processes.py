"""An adapter in other processes: pushed and pulled, loaded by itself, and refused with an instruction."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hub import Hub
from processes import run, run_without
from torch import nn

import hf_lowrank
from hf_lowrank import WaraConfig
from hf_lowrank.testing import tiny_model
from hf_lowrank.tuners import save_as_lora


OURS = ("hf_lowrank", "_hf_lowrank_autoload")
ROOT = Path(hf_lowrank.__file__).parents[1]
LOAD = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
assert "hf_lowrank" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({base!r})
model = peft.PeftModel.from_pretrained(model, {adapter!r})
with torch.no_grad():
    print(repr(model(input_ids=torch.arange(3, 10)[None]).logits.double().abs().sum().item()))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a base model, an adapter of it, the same as LoRA; and what the logits sum up to."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = tiny_model("llama")
    model.save_pretrained(folder / "base")
    model = peft.get_peft_model(model, WaraConfig(wavelet="db2", target_modules=["q_proj", "down_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    model.eval()
    model.save_pretrained(folder / "wara")
    save_as_lora(folder / "lora", model)
    with torch.no_grad():
        total = model(input_ids=torch.arange(3, 10)[None]).logits.double().abs().sum().item()
    return folder, total


def load(folder, adapter):
    return LOAD.format(base=str(folder / "base"), adapter=str(folder / adapter))


def test_without_the_package_loading_stops_with_an_instruction_and_lora_loads(saved):
    folder, total = saved
    both = load(folder, "lora") + load(folder, "wara")
    done = run_without(OURS, both)
    assert abs(float(done.stdout) / total - 1) < 1e-6, "the exact LoRA needs nothing of ours"
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("KeyError: ")
    assert "WARA is a tuner of hf_lowrank: run `pip install -U 'hf-lowrank[peft]'` and `import hf_lowrank`" in last


@pytest.fixture
def installed(tmp_path):
    """Code that makes an interpreter run this tree's start-up hook from a .pth file, as an installed wheel does."""
    hook = ROOT / "hf_lowrank" / "integrations" / "autoload"
    for suffix in (".py", ".pth"):
        shutil.copy(hook.with_suffix(suffix), tmp_path / f"_hf_lowrank_autoload{suffix}")
    return f"import site, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; site.addsitedir({str(tmp_path)!r})\n"


def test_a_process_that_never_imports_the_package(saved, installed):
    folder, total = saved
    done = run_without((), installed + load(folder, "wara"), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) / total - 1) < 1e-6


def test_opting_out_stops_with_an_instruction(saved, installed):
    folder, _ = saved
    done = run_without((), installed + load(folder, "wara"), PYTHONPATH="", HF_LOWRANK_AUTOLOAD="0")
    assert done.returncode == 1
    assert "pip install -U 'hf-lowrank[peft]'" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("order", ["import hf_lowrank, peft", "import peft, hf_lowrank"])
def test_importing_the_package_is_enough_in_either_order(saved, order):
    folder, total = saved
    code = f"{order}\n" + load(folder, "wara").replace('assert "hf_lowrank" not in sys.modules', "")
    done = run(code, HF_LOWRANK_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) / total - 1) < 1e-6


def test_without_peft_everything_else_works():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import hf_lowrank, hf_lowrank.testing
from hf_lowrank import *
from hf_lowrank import MixedRankCallback, MixedRankTrainer
assert {{"MixedRankCallback", "MixedRankConfig", "WaraConfig"}} <= set(dir(hf_lowrank))
try:
    from hf_lowrank import WaraConfig
except ImportError as error:
    assert isinstance(error, hf_lowrank.MissingPackageError), type(error)
    print(error)
"""
    done = run_without(("peft", "pywt"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "WaraConfig needs PEFT, which is not installed: `pip install 'hf-lowrank[peft]'`."


def test_trainer_is_not_imported_before_it_is_needed():
    done = run(
        "import sys, hf_lowrank; print('transformers.trainer' in sys.modules); hf_lowrank.MixedRankCallback; "
        "print('transformers.trainer' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_peft_is_not_imported_before_it_is_needed():
    done = run(
        "import sys, hf_lowrank; print('peft' in sys.modules); hf_lowrank.WaraConfig; print('peft' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_push_and_pull(saved, tmp_path):
    folder, total = saved
    code = f"""
import hf_lowrank, peft, torch
from transformers import AutoModelForCausalLM
def base():
    return AutoModelForCausalLM.from_pretrained({str(folder / "base")!r})
model = peft.PeftModel.from_pretrained(base(), {str(folder / "wara")!r})
model.push_to_hub("me/adapter")
pulled = peft.PeftModel.from_pretrained(base(), "me/adapter")
ids = torch.arange(3, 10)[None]
with torch.no_grad():
    assert torch.equal(pulled(input_ids=ids).logits, model(input_ids=ids).logits)
    print(repr(pulled(input_ids=ids).logits.double().abs().sum().item()))
"""
    with Hub() as hub:
        done = run(code, **hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout.split()[-1]) / total - 1) < 1e-6
    files = hub.repositories["me/adapter"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert json.loads(files["adapter_config.json"])["wavelet"] == "db2"
    assert "GET /me/adapter/resolve/" in "\n".join(hub.requests)
    assert any("/objects/" in request for request in hub.requests), "weights went through LFS"
