"""What cannot work is refused before anything is written, with its name and the cure."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lowrank
from hf_lowrank import LowRankConfig, calibrate_checkpoint, collect_statistics, factorize_checkpoint
from hf_lowrank.testing import tiny_model


@pytest.fixture
def copied(dense, tmp_path):
    """A copy of the tiny model, to be damaged; its first file, and its second."""
    shutil.copytree(dense("llama"), tmp_path / "dense")
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    return tmp_path / "dense", shards


def refuse(source, tmp_path, error, match, config=None, **options):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=match):
        factorize_checkpoint(source, tmp_path / "made", config or LowRankConfig(method="svd"), **options)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"refine": "blocks"}, "`refine`='blocks' runs the whole dense and the compressed model"),
        ({"method": "anchored_svd"}, "`method`='anchored_svd' runs the whole dense"),
        ({"allocation": "lems"}, "`allocation`='lems' runs the whole dense.*load it with from_pretrained"),
        (
            {"method": "svd", "inner": object()},
            "`inner` quantizes the factors, which takes a loaded model; leave it out",
        ),
        ({"allocation": {"name": "knapsack", "cost": "latency"}}, "measure once with hf_lowrank.measure_latencies"),
    ],
)
def test_what_takes_the_whole_model(dense, options, match, tmp_path):
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, match, LowRankConfig(**options))


@pytest.mark.parametrize("method", ["random", "sltrain", {"name": "hybrid", "from_scratch": True}])
def test_methods_that_would_forget_the_weights(dense, method, tmp_path):
    config = LowRankConfig(method=method)
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, "starts from scratch, and the weights", config)


def test_arguments(dense, tmp_path):
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, "`config` must be a LowRankConfig, not dict", {"rank": 4})
    refuse(
        dense("llama"), tmp_path, hf_lowrank.ConfigError, "`max_shard_size`='5 apples' must", max_shard_size="5 apples"
    )
    for dtype in ("bf16", "torch.float32", "int8", torch.float8_e4m3fn, {"text_config": "bf16"}):
        match = r"`dtype`=.* must be 'auto' or a floating-point dtype of torch, one of \['float16', 'bfloat16'"
        refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, match, dtype=dtype)
    refuse(None, tmp_path, hf_lowrank.ConfigError, "`source`=None must be a string or a path")
    with pytest.raises(hf_lowrank.ConfigError, match="`target`=None must be a string or a path"):
        factorize_checkpoint(dense("llama"), None)
    config = LowRankConfig(method="svd", target_modules=["nothing"])
    refuse(dense("llama"), tmp_path, hf_lowrank.TargetError, "matches no linear layer", config)


def test_targets(dense, tmp_path):
    (tmp_path / "made").write_text("mine")
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, "`target`=.*made' is there already")
    assert (tmp_path / "made").read_text() == "mine"
    (tmp_path / "made").unlink()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, "`target`=.*made' is there already")
    (tmp_path / "made" / "mine.txt").unlink()
    factorize_checkpoint(dense("llama"), tmp_path / "made", LowRankConfig(method="svd"))
    assert (tmp_path / "made" / "config.json").exists(), "an empty folder may be there"


def test_sources_that_are_no_dense_checkpoint(dense, copied, tmp_path):
    refuse(
        tmp_path / "nowhere", tmp_path, hf_lowrank.CheckpointError, "There is no model that can be read at .*nowhere"
    )
    small = factorize_checkpoint(dense("llama"), tmp_path / "small", LowRankConfig(method="svd")).folder
    refuse(small, tmp_path, hf_lowrank.ConfigError, "is quantized or factorized already")
    folder, _ = copied
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    refuse(
        folder, tmp_path, hf_lowrank.ConfigError, r"architectures \['NobodysModel'\], none of which transformers has"
    )


def test_a_pickle_is_refused_and_not_read(tmp_path):
    model, _ = tiny_model("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    match = "pytorch_model.bin is not a safetensors file; load it with from_pretrained"
    refuse(tmp_path / "dense", tmp_path, hf_lowrank.CheckpointError, match)


@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_a_truncated_shard_is_named(copied, size, tmp_path):
    folder, shards = copied
    shards[1].write_bytes(shards[1].read_bytes()[:size])
    refuse(folder, tmp_path, hf_lowrank.CheckpointError, f"Cannot read .*{shards[1].name}")


def test_a_shard_that_is_missing_or_holds_other_tensors_is_named(copied, tmp_path):
    folder, shards = copied
    state = load_file(shards[2])
    name = min(state)
    save_file({f"x{key}" if key == name else key: value for key, value in state.items()}, shards[2])
    refuse(folder, tmp_path, hf_lowrank.CheckpointError, f"{shards[2].name} does not hold {name}, which the index")
    shards[2].unlink()
    refuse(folder, tmp_path, hf_lowrank.CheckpointError, shards[2].name)


def test_weights_that_loading_would_make_up(tmp_path):
    model, _ = tiny_model("bert")
    model.save_pretrained(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    del state["cls.predictions.transform.dense.weight"]
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    match = r"model.safetensors does not hold cls.predictions.transform.dense.weight \(1 weights.*lowrank_config"
    refuse(tmp_path / "dense", tmp_path, hf_lowrank.CheckpointError, match)


def test_calibration_that_cannot_work(dense, tmp_path):
    def config(**options):
        return LowRankConfig(**{"method": "whitened_svd", **options})

    missing = config(calibration=str(tmp_path / "none.safetensors"))
    refuse(dense("llama"), tmp_path, hf_lowrank.CalibrationError, "none.safetensors' does not exist", missing)
    refuse(dense("bert"), tmp_path, hf_lowrank.CalibrationError, "'self' samples text", config())
    refuse(dense("llama"), tmp_path, hf_lowrank.CalibrationError, "`calibration` is None", config(calibration=None))
    for data in (3, "", torch.tensor(1), torch.ones(2, 3)):
        match = "`calibration`=.* is neither a name, nor a list, nor a dataloader"
        refuse(dense("llama"), tmp_path, hf_lowrank.CalibrationError, f"(?s){match}", config(calibration=data))
    model, inputs = tiny_model("llama")
    statistics = collect_statistics(model, [inputs()], method="whitened_svd")
    in_memory = config(calibration=statistics)
    refuse(dense("llama"), tmp_path, hf_lowrank.ConfigError, "statistics in memory.*save\\(path\\)", in_memory)
    statistics.save(tmp_path / "s.safetensors")
    other = config(calibration=str(tmp_path / "s.safetensors"))
    refuse(dense("mixtral"), tmp_path, hf_lowrank.StatisticsError, "The statistics are of another model", other)
    by_path = config(calibration=hf_lowrank.Statistics.load(tmp_path / "s.safetensors"))
    assert factorize_checkpoint(dense("llama"), tmp_path / "made", by_path).summary.rows


def test_a_model_without_blocks_to_calibrate_is_told_the_way_round(dense, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_lowrank.statistics._probe.block_names", lambda *_: [])
    config = LowRankConfig(method="whitened_svd", calibration=[{"input_ids": torch.arange(3, 20)[None]}])
    refuse(
        dense("llama"), tmp_path, hf_lowrank.CalibrationError, "by block; collect in one pass .*--in-memory", config
    )
    with pytest.raises(hf_lowrank.CalibrationError, match="block by block; give `in_memory=True`"):
        calibrate_checkpoint(dense("llama"), tmp_path / "s.safetensors", config)
    calibrate_checkpoint(dense("llama"), tmp_path / "s.safetensors", config, in_memory=True)


def test_weights_that_are_saved_together_but_made_apart(dense, monkeypatch, tmp_path):
    from hf_lowrank.integrations.out_of_core import skeleton

    def revert(model, state):
        """Saves two norms as one tensor, as no architecture of this version does."""
        pair = [state[n] for n in ("model.norm.weight", "model.layers.0.input_layernorm.weight") if n in state]
        return {**state, "norms": torch.cat(pair)} if pair else state

    monkeypatch.setattr(skeleton, "revert_weight_conversion", revert)
    match = "norms is read or saved together with .*LlamaForCausalLM cannot be worked on piece by piece; load it with"
    refuse(dense("llama"), tmp_path, hf_lowrank.CheckpointError, match)


def test_weights_that_are_not_numbers_are_named(copied, tmp_path):
    folder, shards = copied
    state = load_file(shards[0])
    name = next(key for key in state if "proj" in key)
    state[name][0, 0] = float("nan")
    save_file(state, shards[0], metadata={"format": "pt"})
    with pytest.raises(hf_lowrank.NonFiniteError, match=name.removesuffix(".weight")):
        factorize_checkpoint(folder, tmp_path / "made", LowRankConfig(method="svd", param_ratio=0.5))
    assert not (tmp_path / "made").exists()


def test_a_damaged_file_in_the_cache_of_the_hub(dense, tmp_path):
    """The cache names a large file by its sha256, and a snapshot links to it."""
    source = dense("llama")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in source.iterdir():
        blob = tmp_path / "blobs" / hf_lowrank.files.sha256_of(path)
        shutil.copy(path, blob)
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    factorize_checkpoint(tmp_path / "snapshot", tmp_path / "good", LowRankConfig(method="svd"))
    shard = sorted((tmp_path / "snapshot").glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.resolve().write_bytes(data)
    match = f"{shard.name} is damaged: its sha256 is .*, and the Hub's is"
    refuse(tmp_path / "snapshot", tmp_path, hf_lowrank.CheckpointError, match)
