"""Statistics that several processes collect together are those of one pass."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from calibration_worker import METHODS as COLLECTED
from calibration_worker import batches
from processes import run_script
from torch.utils.data import DataLoader

from hf_lowrank import Calibration, CalibrationError, ConfigError, Statistics, collect_statistics
from hf_lowrank.methods import METHODS
from hf_lowrank.testing import tiny_model


def collected(model, method, which=slice(None)):
    return collect_statistics(tiny_model(model)[0], batches()[which], method=method)


def pooled(shares, module, name):
    """A covariance within the groups of each process."""
    freedom = [share.provenance["tokens"] - 1 for share in shares]
    scatters = [share.get(module, [name])[name] * count for share, count in zip(shares, freedom, strict=True)]
    return sum(scatters) / sum(freedom)


def assert_close(found, model, method):
    expected, shares = collected(model, method), [collected(model, method, slice(i, None, 2)) for i in (0, 1)]
    assert found.leaders == expected.leaders
    assert found.provenance == {**expected.provenance, "processes": 2}
    # Labels of `gradient_gram` are drawn, by each process its own.
    names = [name for name in METHODS[method].statistics if name != "gradient_gram"]
    for module in expected.leaders:
        for name, tensor in expected.get(module, names).items():
            if name == "input_covariance":
                tensor = pooled(shares, module, name)
            torch.testing.assert_close(found.get(module, [name])[name], tensor, rtol=1e-5, atol=1e-7)


def test_two_processes_find_what_one_pass_does(tmp_path):
    done = run_script(Path(__file__).parents[1] / "calibration_worker.py", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    for model, methods in COLLECTED.items():
        for method in methods:
            paths = [tmp_path / f"{model}-{method}-{rank}.safetensors" for rank in (0, 1)]
            assert paths[0].read_bytes() == paths[1].read_bytes(), "all are given the same"
            assert_close(Statistics.load(paths[0]), model, method)
    own = Statistics.load(tmp_path / "self-0.safetensors")
    assert (tmp_path / "self-1.safetensors").read_bytes() == (tmp_path / "self-0.safetensors").read_bytes()
    assert own.provenance["tokens"] == 5 * 8 and own.provenance["samples"] == 5
    both = Statistics.load(tmp_path / "both-0.safetensors")
    assert (tmp_path / "both-1.safetensors").read_bytes() == (tmp_path / "both-0.safetensors").read_bytes()
    assert {"data": "40 texts", "tokens": 7 * 8, "samples": 7, "sampled": 0.4, "processes": 2}.items() <= (
        both.provenance.items()
    )


def test_a_lone_process_is_a_plain_pass():
    model = tiny_model("llama")[0]
    found = collect_statistics(model, batches(), accelerator=Accelerator(cpu=True))
    expected = collect_statistics(model, batches())
    for module in expected.leaders:
        for name, tensor in expected.get(module, METHODS["kfac_svd"].statistics).items():
            assert torch.equal(found.get(module, [name])[name], tensor)


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    model, accelerator = tiny_model("llama")[0], Accelerator(cpu=True)
    prepared = accelerator.prepare(DataLoader(batches(), batch_size=None))
    with pytest.raises(CalibrationError, match=r"went through accelerator.prepare\(\)"):
        collect_statistics(model, prepared, accelerator=accelerator)
    with pytest.raises(ConfigError, match="`folder` of Calibration keeps the parts of one process"):
        collect_statistics(model, Calibration(batches(), folder=tmp_path), accelerator=accelerator)
    with pytest.raises(ConfigError, match="must be an accelerate.Accelerator"):
        collect_statistics(model, batches(), accelerator=True)
