"""The path of a newcomer, each step in a process of its own, on a small model and a hub on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation.conftest import TEXT, make_tokenizer
from hub import Hub
from transformers import LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).resolve().parents[1]
PULL = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "hf_lowrank" not in sys.modules
model, tokenizer = (kind.from_pretrained("me/small") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The cat sat", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0]))
print(type(model.model.layers[0].mlp.down_proj).__name__)
"""
ADAPT = """
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from hf_lowrank import WaraConfig
tokenizer = AutoTokenizer.from_pretrained("me/small")
ids = torch.tensor(tokenizer(open("text.txt").read())["input_ids"][:320]).view(-1, 32)
data = [{"input_ids": row, "labels": row} for row in ids]
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("me/small"), WaraConfig(r=2, task_type="CAUSAL_LM"))
arguments = TrainingArguments("out", max_steps=40, learning_rate=3e-2, use_cpu=True, report_to="none",
                              save_strategy="no", logging_steps=1, disable_tqdm=True)
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(losses[0], losses[-1])
model.merge_and_unload().save_pretrained("tuned")
"""
EXPORT = """
import numpy, onnxruntime, torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained("tuned").eval()
model.config.use_cache = False
inputs = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
OnnxExporter().export(model, dict(inputs), config=OnnxConfig(dynamic=True)).save_pretrained("onnx")
import pathlib
path = next(pathlib.Path("onnx").rglob("*.onnx"))
session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
given = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
expected = model(**inputs).logits.detach().numpy()
print(numpy.abs(session.run(None, given)[0] - expected).max())
"""


@pytest.fixture
def folder(tmp_path):
    """A dense model with its tokenizer, and a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 12)
    return tmp_path


def test_from_the_command_line_to_onnx(folder):
    for package in ("optimum.commands", "peft", "onnx", "onnxscript", "onnxruntime", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with Hub() as hub:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

        def run(*command):
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        cli = [sys.executable, str(Path(sys.executable).with_name("optimum-cli")), "lowrank"]
        run(*cli, "factorize", "dense", "small", "--param-ratio", "0.7", "--calibration", "text.txt")
        assert json.loads(run(*cli, "inspect", "small", "--json"))["summary"]["rows"]
        run(*cli, "evaluate", "small", "--perplexity", "text.txt", "--output", "after.json")
        run(*cli, "report", "small", "report", "--dense", "dense", "--quality", "factorized=after.json")
        assert (folder / "report" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        run(*cli, "push", "small", "me/small", "--evaluation", "after.json")
        text, layer = run(sys.executable, "-c", PULL).strip().splitlines()
        assert text.startswith("The cat sat")
        assert layer == "PivotedLinear"
        first, last = map(float, run(sys.executable, "-c", ADAPT).split()[-2:])
        assert last < 0.9 * first
        assert float(run(sys.executable, "-c", EXPORT).split()[-1]) < 1e-4
