"""A full disk: said clearly, no half checkpoint, and the next call goes on."""

import builtins
import errno
import multiprocessing
import os
import resource
import shutil
import signal

import pytest

import hf_lowrank
from hf_lowrank import LowRankConfig, factorize_checkpoint


SHARD = "40KB"


def config():
    return LowRankConfig(method="svd", param_ratio=0.5, allocation="knapsack")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "made"
    factorize_checkpoint(dense("llama"), target, config(), max_shard_size=SHARD)
    return contents(target)


class FullDisk:
    """Lets so many bytes be written under a folder, and no more."""

    def __init__(self, folder, left):
        self.folder, self.left, self.open = str(folder), left, builtins.open

    def __call__(self, path, mode="r", *args, **kwargs):
        file = self.open(path, mode, *args, **kwargs)
        if "w" in mode and str(path).startswith(self.folder):
            write = file.write

            def limited(data):
                self.left -= len(data)
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            file = Wrapped(file, limited)
        return file


class Wrapped:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("left", [100, 20_000, 90_000, 210_000, 300_000])
def test_a_disk_that_fills_up(dense, whole, left, tmp_path, monkeypatch):
    disk = FullDisk(tmp_path, left)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", disk)
        with pytest.raises(
            hf_lowrank.ResourceError, match="Cannot write .*: No space left on device; free some space"
        ):
            factorize_checkpoint(dense("llama"), tmp_path / "made", config(), max_shard_size=SHARD)
    # Nothing is kept where nothing is finished.
    assert os.listdir(tmp_path) == (["made.partial"] if left > 100 else [])
    assert not list((tmp_path / "made.partial").rglob("*.partial"))
    factorize_checkpoint(dense("llama"), tmp_path / "made", config(), max_shard_size=SHARD)
    assert contents(tmp_path / "made") == whole


def limited(source, target, size):
    """In a process of its own: no file may be larger than `size`."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python gets an error instead"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        factorize_checkpoint(source, target, config(), max_shard_size=SHARD)
    except hf_lowrank.ResourceError as error:
        assert "Cannot write" in str(error) and "File too large" in str(error)
        raise SystemExit(7) from error


def test_the_system_refuses_to_write(dense, whole, tmp_path):
    """A real limit, met while a weight file is written: parts are smaller."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=limited, args=(dense("llama"), tmp_path / "made", 30_000))
    process.start()
    process.join(120)
    assert process.exitcode == 7
    assert os.listdir(tmp_path) == ["made.partial"]
    factorize_checkpoint(dense("llama"), tmp_path / "made", config(), max_shard_size=SHARD)
    assert contents(tmp_path / "made") == whole


def test_a_disk_that_is_too_small_is_noticed_before_factorizing(dense, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(hf_lowrank.ResourceError, match="takes 0.00 GiB more while it is written.*choose a target on"):
        factorize_checkpoint(dense("llama"), tmp_path / "made", config())
    assert not list((tmp_path / "made.partial" / "checkpoint").iterdir())


def test_files_of_others_are_let_alone(dense, tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "notes.txt").write_text("mine")
    factorize_checkpoint(dense("llama"), tmp_path / "made", config())
    assert contents(tmp_path / "made.partial") == {"notes.txt": b"mine"}
