"""Callbacks that find ranks or rest factors, in processes of their own: killed and resumed, and in two at once."""

from pathlib import Path

import pytest
import torch
from processes import run_script
from rank_training_worker import SETUPS


WORKER = Path(__file__).parents[1] / "rank_training_worker.py"


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = run_script(WORKER, folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    done = run_script(WORKER, folder, "both", processes=2, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(alone, setup):
    whole, resumed = (torch.load(alone / setup / name / "end_0.pt") for name in ("whole", "killed"))
    # Saved after 4 steps, killed after 5.
    assert len(whole["steps"]) == 8
    assert resumed["steps"] == whole["steps"][4:]
    assert_same(resumed["state"], whole["state"])
    assert len({str(step) for step in whole["steps"]}) > 1, "something is drawn, dropped or put to rest"


@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_end_in_the_same_weights(both, alone, setup):
    one, other = (torch.load(both / setup / f"end_{rank}.pt") for rank in (0, 1))
    assert one["steps"] == other["steps"]
    assert_same(one["state"], other["state"])
    # Batches of both together are those of one process that accumulates two.
    single = torch.load(alone / setup / "whole" / "end_0.pt")
    assert one["steps"] == single["steps"]
    for name, tensor in single["state"].items():
        torch.testing.assert_close(one["state"][name], tensor, rtol=1e-3, atol=1e-4)
