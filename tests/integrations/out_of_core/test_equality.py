"""The files are those of a model that was factorized while it loaded, and saved: every byte, config included."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig, LowRankLinear, factorize_checkpoint, summary
from hf_lowrank.files import sha256_of
from hf_lowrank.testing import ARCHITECTURES, tiny_model


EXTRA = {"factorization.json", "recipe.yaml"}
SHARD = "40KB"
# Matrices of one input, keys and values of which are too flat to be factorized alone.
GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def loaded(folder, config, **options):
    """The model that loading gives."""
    cls = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    return cls.from_pretrained(folder, lowrank_config=config, **options)


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def assert_same(folder, config, tmp_path, again=None, **options):
    """Both ways give the same files; returns the result of the one out of core."""
    loaded(folder, config, **options).save_pretrained(tmp_path / "loaded", max_shard_size=SHARD)
    result = factorize_checkpoint(folder, tmp_path / "made", again or config, max_shard_size=SHARD, **options)
    expected, found = contents(tmp_path / "loaded"), contents(tmp_path / "made")
    assert set(found) - set(expected) <= EXTRA
    assert {name for name in expected if expected[name] != found[name]} == set()
    assert sorted(os.listdir(tmp_path)) == ["loaded", "made"], "nothing else is left"
    return result


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture(dense, svd, architecture, tmp_path):
    result = assert_same(dense(architecture), svd(), tmp_path)
    assert (tmp_path / "made" / "model.safetensors.index.json").exists()
    assert str(result.summary) == str(summary(loaded(dense(architecture), svd())))
    assert len(result.summary.rows) > 5


@pytest.mark.parametrize(
    ("architecture", "excluded"),
    [("llama", "down_proj"), ("gpt2", "c_proj"), ("t5", "wo")],
)
def test_ranks_by_error_curves_and_fewer_than_all_targets(dense, svd, architecture, excluded, tmp_path):
    result = assert_same(dense(architecture), svd(allocation="knapsack", exclude_modules=[excluded]), tmp_path)
    assert len({row.rank for row in result.summary.rows}) > 1
    assert not any(row.name.endswith(excluded) for row in result.summary.rows)


def assert_same_tensors(config, tmp_path):
    """As `assert_same`, for experts of which some stay dense: saving puts those of one tensor into one file."""
    loaded(tmp_path / "dense", config).save_pretrained(tmp_path / "loaded", max_shard_size=SHARD)
    result = factorize_checkpoint(tmp_path / "dense", tmp_path / "made", config, max_shard_size=SHARD)
    expected, found = tensors(tmp_path / "loaded"), tensors(tmp_path / "made")
    assert sorted(expected) == sorted(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any("experts.0.w2.weight" in name for name in found)
    assert (tmp_path / "loaded" / "config.json").read_bytes() == (tmp_path / "made" / "config.json").read_bytes()
    return result


def test_experts_of_which_one_weight_stays_dense(dense, svd, tmp_path):
    (tmp_path / "dense").symlink_to(dense("mixtral"))
    assert_same_tensors(svd(allocation="knapsack", exclude_modules=["experts.down_proj"]), tmp_path)


def test_experts_in_the_metric_of_the_loss(dense, statistics, tmp_path):
    (tmp_path / "dense").symlink_to(dense("mixtral"))
    result = assert_same_tensors(LowRankConfig(calibration=statistics("mixtral", "kfac_svd")), tmp_path)
    assert any(row.name.endswith("experts.gate_up_proj") for row in result.summary.rows)


OPTIONS = {
    "energy": {"param_ratio": None, "energy": 0.8},
    "bytes": {"param_ratio": None, "target_bytes": 260_000},
    "pattern": {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": "dense"}},
    "pivoted": {"format": "pivoted"},
    "one device": {"compute_device": "cpu"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(dense, svd, name, tmp_path):
    assert_same(dense("llama_tied"), svd(**OPTIONS[name]), tmp_path)


METHODS = {
    "default": {},
    "whitened": {"method": "whitened_svd", "param_ratio": 0.5},
    "joint groups": {"method": {"name": "kfac_svd", "joint_groups": GROUPS}},
    "shared by layers": {"method": {"name": "basis_sharing", "joint_groups": GROUPS}, "param_ratio": 0.6},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_with_saved_statistics(dense, statistics, name, tmp_path):
    config = LowRankConfig(**METHODS[name], calibration=statistics("llama", "kfac_svd"))
    result = assert_same(dense("llama"), config, tmp_path)
    grouped = isinstance(METHODS[name].get("method"), dict)
    assert ("shared_basis" in {row.format for row in result.summary.rows}) == grouped


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_a_method_that_changes_biases(dense, statistics, architecture, tmp_path):
    config = LowRankConfig(method="feature_pca", param_ratio=0.5, calibration=statistics(architecture, "feature_pca"))
    assert_same(dense(architecture), config, tmp_path)


def test_statistics_collected_on_the_way(dense, tmp_path):
    sizes = {"samples": 3, "length": 12, "batch_size": 2}
    parts = Calibration(folder=tmp_path / "parts", **sizes)
    model = loaded(dense("llama"), LowRankConfig(calibration=parts))
    model.save_pretrained(tmp_path / "loaded")
    result = factorize_checkpoint(dense("llama"), tmp_path / "made", LowRankConfig(calibration=Calibration(**sizes)))
    assert contents(tmp_path / "loaded").items() <= contents(tmp_path / "made").items()
    assert sorted(os.listdir(tmp_path)) == ["loaded", "made", "parts"]
    assert result.recipe["calibration"]["data"] == "self"


def test_dtypes_are_kept_or_changed_as_loading_does(dense, svd, tmp_path):
    folder = dense("llama", torch.bfloat16)
    result = assert_same(folder, svd(), tmp_path)
    assert result.summary.bytes == 2 * result.summary.parameters
    other = tmp_path / "float16"
    other.mkdir()
    assert_same(dense("t5"), svd(), other, dtype=torch.float16)


def test_one_file_in_one_file_out_and_what_stands_beside(svd, tmp_path):
    tiny_model("qwen2")[0].save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "notes.txt", "x.py"):
        (tmp_path / "dense" / name).write_text(name)
    result = factorize_checkpoint(tmp_path / "dense", tmp_path / "a" / "b" / "made", svd())
    found = set(os.listdir(result.folder))
    assert found == {"config.json", "generation_config.json", "model.safetensors", *EXTRA} | {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    record = json.loads((tmp_path / "a" / "b" / "made" / "factorization.json").read_text())
    assert record["sources"] == {"model.safetensors": sha256_of(tmp_path / "dense" / "model.safetensors")}
    assert record["files"] == {n: sha256_of(os.path.join(result.folder, n)) for n in found - {"factorization.json"}}


def test_nothing_to_gain_leaves_an_ordinary_checkpoint(dense, svd, tmp_path, caplog):
    result = assert_same(dense("llama"), svd(param_ratio=1.0), tmp_path)
    assert "Nothing becomes smaller" in caplog.text
    assert not result.summary.rows and not result.recipe
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


def test_tied_weights_that_are_stored_twice(svd, tmp_path):
    model, _ = tiny_model("llama_tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path / "dense")
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "both"
    folder.mkdir()
    assert_same(tmp_path / "dense", svd(), folder)
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_lowrank.CheckpointError, match="The config ties lm_head.weight to .*different weights"):
        factorize_checkpoint(tmp_path / "dense", tmp_path / "other", svd())
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.partial").exists()


def test_what_loading_leaves_out_is_left_out_with_a_warning(svd, tmp_path, caplog):
    model, _ = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    state = {**model.state_dict(), "value_head.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "both"
    folder.mkdir()
    assert_same(tmp_path / "dense", svd(), folder)
    assert "1 entries of the checkpoint, such as value_head.weight, are no part of a LlamaForCausalLM" in caplog.text


def test_a_checkpoint_of_other_names(dense, svd, tmp_path):
    """Keys without the prefix of the base model, as base models are saved."""
    base = tiny_model("llama")[0].model
    base.save_pretrained(tmp_path / "dense")
    result = assert_same_in(tmp_path / "dense", svd(), tmp_path / "both")
    assert result.summary.rows[0].name == "layers.0.self_attn.q_proj"


def assert_same_in(folder, config, where):
    where.mkdir()
    return assert_same(folder, config, where)


def test_the_result_loads_without_a_word_about_how(dense, svd, tmp_path):
    factorize_checkpoint(dense("llama"), tmp_path / "made", svd())
    model, info = loaded_plainly(tmp_path / "made")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankLinear)


def loaded_plainly(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
