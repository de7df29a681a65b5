"""An interrupted call goes on where it was, ends in the same files, and trusts nothing that has changed meanwhile."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import BatchEncoding

import hf_lowrank
from hf_lowrank import LowRankConfig, factorize_checkpoint
from hf_lowrank.files import sha256_of
from hf_lowrank.integrations import streaming
from hf_lowrank.integrations.out_of_core import config_from, read_recipe, verb, verify_checkpoint


SHARD = "60KB"


class Interrupted(BaseException):
    """As the user presses a key; no `except` for errors stops it."""


def config(dense, statistics):
    return LowRankConfig(calibration=statistics("llama", "kfac_svd"))


@pytest.fixture(scope="module")
def whole(dense, statistics, tmp_path_factory):
    """The files of a call that was not interrupted."""
    target = tmp_path_factory.mktemp("whole") / "made"
    factorize_checkpoint(dense("llama"), target, config(dense, statistics), max_shard_size=SHARD)
    return contents(target)


@pytest.fixture
def work(dense, statistics, tmp_path, monkeypatch):
    """`work(after)`: a call that is interrupted after so many weights, or not; returns how many were factorized."""
    shutil.copytree(dense("llama"), tmp_path / "dense")

    def run(after=None, options=None):
        count = 0

        def counted(*arguments):
            nonlocal count
            if count == after:
                raise Interrupted
            count += 1
            return original(*arguments)

        original = streaming.factorize_site
        chosen = options or config(dense, statistics)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "factorize_site", counted)
            try:
                factorize_checkpoint(tmp_path / "dense", tmp_path / "made", chosen, max_shard_size=SHARD)
            except Interrupted:
                assert not (tmp_path / "made").exists()
        return count

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def flip(path, position=-1):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(data)


def parts_of(folder, begin):
    return sorted(path for path in (folder / "parts").iterdir() if path.name.startswith(begin))


def test_no_weight_is_factorized_twice(work, whole, tmp_path):
    done = [work(after) for after in (3, 0, 5)]
    assert done == [3, 0, 5]
    factorized = json.loads(whole["config.json"])["quantization_config"]["modules"]
    assert work() == len(factorized) - 8 > 0
    assert contents(tmp_path / "made") == whole
    assert sorted(os.listdir(tmp_path)) == ["dense", "made"]


def test_parts_go_when_their_file_is_there(work, tmp_path):
    work(9)
    work = tmp_path / "made.partial"
    assert len(list((work / "checkpoint").iterdir())) == len(parts_of(work, "shard.")) > 0
    assert 0 < len(parts_of(work, "factors.")) < 9


def test_a_finished_call_is_not_done_again(work, tmp_path):
    work()
    before = contents(tmp_path / "made"), (tmp_path / "made").stat().st_mtime_ns
    assert work() == 0
    assert (contents(tmp_path / "made"), (tmp_path / "made").stat().st_mtime_ns) == before
    flip(tmp_path / "made" / "config.json")
    with pytest.raises(
        hf_lowrank.CheckpointError, match="made/config.json has another sha256 than it was written with"
    ):
        work()
    (tmp_path / "made" / "config.json").unlink()
    with pytest.raises(hf_lowrank.CheckpointError, match="made/config.json is missing"):
        verify_checkpoint(tmp_path / "made")


def test_interrupted_between_the_last_two_steps(work, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(verb, "clear", lambda work: None)
        work()
    assert (tmp_path / "made.partial" / "parts").is_dir()
    assert work() == 0
    assert sorted(os.listdir(tmp_path)) == ["dense", "made"]


def test_another_recipe_is_refused_and_the_parts_stay(work, whole, statistics, tmp_path):
    before = len(json.loads(whole["config.json"])["quantization_config"]["modules"])
    work(3)
    other = LowRankConfig(param_ratio=0.7, calibration=statistics("llama", "kfac_svd"))
    with pytest.raises(
        hf_lowrank.CheckpointError, match=r"another run, which differs in \['recipe'\]; repeat that run"
    ):
        work(options=other)
    assert work() == before - 3
    with pytest.raises(
        hf_lowrank.ConfigError, match="`target`=.*made.* is there already, and not made by the same call"
    ):
        work(options=other)


def test_other_statistics_are_refused(work, statistics, tmp_path):
    copied = tmp_path / "statistics.safetensors"
    shutil.copy(statistics("llama", "kfac_svd"), copied)
    work(3, LowRankConfig(calibration=str(copied)))
    flip(copied)
    with pytest.raises(hf_lowrank.CheckpointError, match=r"differs in \['calibration'\]"):
        work(options=LowRankConfig(calibration=str(copied)))


@pytest.mark.parametrize("where", ["data", "header"])
def test_a_bit_of_the_source_that_flips_meanwhile_is_noticed(work, tmp_path, where):
    work(3)
    shard = tmp_path / "dense" / "model-00002-of-00006.safetensors"
    # In the name of a tensor, the header is whole and the tensor is missing.
    flip(shard, -1 if where == "data" else shard.read_bytes().index(b"layers"))
    named = (
        "model-00002-of-00006.safetensors of the source is damaged or another file" if where == "data" else shard.name
    )
    with pytest.raises(hf_lowrank.CheckpointError, match=named):
        work()
    flip(shard, -1 if where == "data" else shard.read_bytes().index(b"mayers"))
    work()
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
@pytest.mark.parametrize("begin", ["factors.", "curves.", "shard."])
def test_a_damaged_part_is_named_and_made_again_once_removed(work, whole, tmp_path, begin, damage):
    work(9)
    part = parts_of(tmp_path / "made.partial", begin)[-1]
    if damage == "flip":
        flip(part, -1 if begin != "shard." else 60)
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(hf_lowrank.CheckpointError, match=f"{part.name}.*remove it to have it made again"):
        work()
    part.unlink()
    work()
    assert contents(tmp_path / "made") == whole


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_of_the_new_checkpoint(work, whole, tmp_path, damage):
    work(9)
    file = sorted((tmp_path / "made.partial" / "checkpoint").iterdir())[0]
    if damage != "remove":
        flip(file) if damage == "flip" else file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(hf_lowrank.CheckpointError, match=f"{file.name} is damaged.*remove it and run again"):
            work()
    file.unlink()
    work()
    assert contents(tmp_path / "made") == whole


def test_two_at_once(work, tmp_path):
    (tmp_path / "made.partial").mkdir()
    with FileLock(tmp_path / "made.partial" / ".lock"):
        with pytest.raises(hf_lowrank.ResourceError, match="Another process is at work in .*made.partial"):
            work()
    assert work() > 0


def test_the_recipe_beside_the_weights_gives_the_same_files(work, dense, statistics, tmp_path):
    work()
    again, options = config_from(read_recipe(tmp_path / "made" / "recipe.yaml"))
    assert options == {"max_shard_size": SHARD}
    factorize_checkpoint(tmp_path / "dense", tmp_path / "again", again, **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "made")


def test_data_that_only_this_process_has_is_not_in_a_recipe(dense, tmp_path):
    ids = {"input_ids": torch.arange(3, 20)[None]}
    options = {"method": "whitened_svd", "param_ratio": 0.5}
    factorize_checkpoint(dense("llama"), tmp_path / "made", LowRankConfig(calibration=(b for b in [ids]), **options))
    assert "recipe.yaml" not in os.listdir(tmp_path / "made")
    recipe = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["calibration"]["data"] == "batches"


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: [batch]])
def test_what_a_tokenizer_gives_is_a_batch(dense, wrap, tmp_path):
    ids, options = {"input_ids": torch.arange(3, 20)[None]}, {"method": "whitened_svd", "param_ratio": 0.5}
    factorize_checkpoint(dense("llama"), tmp_path / "plain", LowRankConfig(calibration=[ids], **options))
    config = LowRankConfig(calibration=wrap(BatchEncoding(ids)), **options)
    factorize_checkpoint(dense("llama"), tmp_path / "made", config)
    assert sha256_of(tmp_path / "made" / "model.safetensors") == sha256_of(tmp_path / "plain" / "model.safetensors")
