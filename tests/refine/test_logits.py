"""Refinement of all blocks at once: what it improves, what it leaves alone, and that a kill costs nothing but time."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trained_formats import FORMATS
from transformers import AutoModel
from walks import batches_of

from hf_lowrank import Calibration, CheckpointError, ConfigError, LowRankConfig, NonFiniteError, factorize, summary
from hf_lowrank.refine import logits
from hf_lowrank.refine.distillation import logit_loss
from hf_lowrank.testing import tiny_model


OPTIONS = {"method": "svd", "param_ratio": 0.4, "rank_multiple": 1}
LONGER = {"name": "logits", "epochs": 8, "learning_rate": 1e-3}
ARCHITECTURES = ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "whisper", "qwen3_moe", "llava"]


def predictions(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch)["logits"].float()


def divergence(dense, model, batches):
    """Mean divergence of the predictions."""
    found = [logit_loss(predictions(model, batch), predictions(dense, batch)) for batch in batches]
    return float(torch.stack(found).mean())


def compared(model, batches, refine=LONGER, **options):
    """`(before, after)`: the divergence of the factorized model from the dense one."""
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    options = {**OPTIONS, **options}
    factorize(plain, LowRankConfig(**options), calibration=batches)
    refined = factorize(model, LowRankConfig(**options, refine=refine), calibration=batches)
    assert [(row.rank, row.bytes) for row in summary(refined).rows] == [
        (row.rank, row.bytes) for row in summary(plain).rows
    ]
    return divergence(dense, plain, batches), divergence(dense, refined, batches)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predictions_come_closer_to_the_dense_ones(name):
    model, inputs = tiny_model(name)
    before, after = compared(model, batches_of(inputs))
    assert after < 0.7 * before


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: str(options["method"]))
def test_every_format_is_trained(options):
    model, inputs = tiny_model("llama")
    before, after = compared(model, batches_of(inputs), **options)
    assert after < 0.5 * before


@pytest.mark.parametrize("options", [{}, *FORMATS], ids=lambda options: str(options.get("method")))
def test_bfloat16_models_are_trained_in_float32_and_stay_bfloat16(options):
    model, inputs = tiny_model("llama")
    model = model.to(torch.bfloat16)
    before, after = compared(model, batches_of(inputs), **options)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert after < 0.9 * before


def test_dropout_is_no_part_of_it():
    states = []
    for training in (False, True):
        model, inputs = tiny_model("bert")
        model.config.hidden_dropout_prob = 0.5
        model = type(model)(model.config)
        model.load_state_dict(tiny_model("bert")[0].state_dict())
        factorize(model.train(training), LowRankConfig(**OPTIONS, refine="logits"), calibration=batches_of(inputs))
        assert model.training == training
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def run(folder, batches, **options):
    """The parameters of a refined model."""
    model = tiny_model("llama")[0]
    config = LowRankConfig(**OPTIONS, refine={"name": "logits", "epochs": 3, **options})
    return factorize(model, config, calibration=Calibration(batches, folder=folder)).state_dict()


KILLED = """
import os, signal, sys
sys.path[:0] = {tests!r}
import test_logits
from test_logits import batches_of, logits, run, tiny_model
write = logits._Kept.write

def then_die(self, optimizer, step):
    write(self, optimizer, step)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

logits._Kept.write = then_die
run({folder!r}, batches_of(tiny_model("llama")[1]))
"""


@pytest.mark.parametrize("step", [1, 5, 9])
def test_killed_and_resumed_gives_the_same_bits(step, tmp_path):
    batches = batches_of(tiny_model("llama")[1])
    expected = run(None, batches)
    here = Path(__file__).parent
    code = KILLED.format(tests=[str(here), str(here.parent)], folder=str(tmp_path), step=step)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "refine").iterdir()] == [f"step-{step}.safetensors"]
    resumed = run(str(tmp_path), batches)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_a_parameter_that_nothing_has_reached_is_no_obstacle(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def refined(folder):
        model, inputs = tiny_model("llama")
        model.model.layers[0].register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        config = LowRankConfig(**OPTIONS, refine={"name": "logits", "epochs": 3})
        return factorize(model, config, calibration=Calibration(batches_of(inputs), folder=folder)).state_dict()

    def then_stop(self, optimizer, step):
        write(self, optimizer, step)
        if step == 5:
            raise Stopped

    expected, write = refined(None), logits._Kept.write
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(logits._Kept, "write", then_stop)
        refined(str(tmp_path))
    resumed = refined(str(tmp_path))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_finished_steps_are_not_taken_again(tmp_path, monkeypatch):
    batches = batches_of(tiny_model("llama")[1])
    expected = run(str(tmp_path), batches)
    monkeypatch.setattr(logits, "_divergence", lambda *args: pytest.fail("trained again"))
    resumed = run(str(tmp_path), batches)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_the_folder_of_another_run_is_refused(tmp_path):
    inputs = tiny_model("llama")[1]
    run(str(tmp_path), batches_of(inputs))
    with pytest.raises(CheckpointError, match=r"step-9.safetensors was written by another run"):
        run(str(tmp_path), batches_of(inputs), learning_rate=0.5)
    with pytest.raises(CheckpointError, match="another run"):
        run(str(tmp_path), batches_of(inputs, 2))


def test_a_model_without_predictions_is_refused_before_any_factor_is_made(monkeypatch):
    model, inputs = tiny_model("bert")
    bare = AutoModel.from_config(model.config)
    monkeypatch.setattr("hf_lowrank.integrations.verbs.factorize_site", lambda *args: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=r"`refine`='logits' compares predictions, and BertModel gives no `logits`"):
        factorize(bare, LowRankConfig(**OPTIONS, refine="logits"), calibration=batches_of(inputs))


def test_float16_is_refused():
    model, inputs = tiny_model("llama")
    with pytest.raises(ConfigError, match="gradients in float16 vanish; load the model in bfloat16"):
        factorize(model.half(), LowRankConfig(**OPTIONS, refine="logits"), calibration=batches_of(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, r"`epochs`=-1 of logits must be an integer of at least 0"),
        ({"learning_rate": 0}, r"`learning_rate`=0 of logits must be a number above 0"),
        ({"warmup_ratio": 1.0}, r"`warmup_ratio`=1.0 of logits must be a number in \[0, 1\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(refine={"name": "logits", **options})


def test_a_learning_rate_that_diverges_is_named():
    model, inputs = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"all blocks diverges.*lower `learning_rate`=1e\+30"):
        factorize(
            model,
            LowRankConfig(**OPTIONS, refine={"name": "logits", "learning_rate": 1e30}),
            calibration=batches_of(inputs),
        )
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
