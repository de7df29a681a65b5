"""Killed at any moment and run again, `factorize` ends in the same files."""

import os
import random
import signal
import time

import pytest
from commands import Kill, command, start

from hf_lowrank.files import sha256_of
from hf_lowrank.testing import tiny_model


# Sampling, statistics block by block, error curves, factors, several files: all there is to be interrupted.
OPTIONS = "--param-ratio 0.7 --calibration-samples 2 --calibration-length 6 --calibration-batch-size 1".split()
OPTIONS += ["--max-shard-size", "60KB"]
KILLS = 20


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama")[0].save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """The hashes of an uninterrupted run, how many things it does to files, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    target = folder / "made"
    command("list")
    begun = time.perf_counter()
    done = command("factorize", dense, target, *OPTIONS, kill=Kill(str(target), counter=str(folder / "count")))
    assert done.code == 0, done.err
    return hashes(target), int((folder / "count").read_text()), time.perf_counter() - begun


def hashes(folder):
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def test_killed_at_twenty_random_moments(dense, whole, tmp_path):
    """Killed at a random one of all moments at which it touches a file of its own, and again while it goes on."""
    expected, count, _ = whole
    moments, kills, chains = random.Random(0), 0, 0
    while kills < KILLS:
        target = tmp_path / str(chains) / "made"
        chains, moment = chains + 1, moments.randint(1, count)
        while True:
            done = command("factorize", dense, target, *OPTIONS, kill=Kill(str(target), moment))
            assert not target.exists() or hashes(target) == expected, "never a half checkpoint"
            if done.code != -signal.SIGKILL:
                break
            kills += 1
            # What goes on has less to do, and may be finished before its moment comes.
            moment = moments.randint(1, count // 2)
        assert done.code == 0, done.err
        assert hashes(target) == expected
        assert os.listdir(target.parent) == ["made"]
    assert chains < KILLS, "some were killed more than once"


def test_killed_from_outside(dense, whole, tmp_path):
    expected, _, seconds = whole
    moments = random.Random(0)
    target = tmp_path / "made"
    for _ in range(3):
        process = start(["factorize", dense, target, *OPTIONS], tmp_path / "out", tmp_path / "err")
        time.sleep(moments.uniform(0.2, 1) * seconds)
        process.kill()
        process.join(60)
        assert not target.exists() or hashes(target) == expected
    done = command("factorize", dense, target, *OPTIONS)
    assert done.code == 0, done.err
    assert hashes(target) == expected
