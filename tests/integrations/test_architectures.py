"""Everything transformers loads: factorize at load, save sharded, reload, compare."""

import json

import pytest
import torch
from transformers import AutoConfig

from hf_lowrank import LowRankConfig, LowRankLinear, factorize, summary, to_dense
from hf_lowrank.surgery import factorized, match_sites
from hf_lowrank.testing import ARCHITECTURES, tiny_model


NAMES = sorted(ARCHITECTURES)
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
# float32: the product of two factors rounds differently from one matrix.
TOLERANCE = 1e-4


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs()).logits


def full_ranks(model):
    return {site.name: min(site.out_features, site.in_features) for site in match_sites(model)}


@pytest.fixture(params=NAMES)
def saved(request, tmp_path):
    """(class, folder of the dense checkpoint, dense model, inputs)."""
    model, inputs = tiny_model(request.param)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    return type(model), tmp_path / "dense", model, inputs


def test_full_rank_reproduces_the_dense_logits(saved):
    cls, folder, dense, inputs = saved
    config = LowRankConfig(method="svd", rank_pattern=full_ranks(dense))
    model, info = cls.from_pretrained(folder, lowrank_config=config, output_loading_info=True)
    assert info == CLEAN
    assert len(factorized(model)) == len(match_sites(dense))
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=0, atol=TOLERANCE)


def test_factorize_save_sharded_reload(saved, tmp_path):
    cls, folder, dense, inputs = saved
    config = LowRankConfig(method="svd", param_ratio=0.5)
    model, info = cls.from_pretrained(folder, lowrank_config=config, output_loading_info=True)
    assert info == CLEAN
    assert config.modules is None, "the user's object is not written to"
    assert factorized(model)
    model.save_pretrained(tmp_path / "small", max_shard_size="60KB")
    assert (tmp_path / "small" / "model.safetensors.index.json").exists()
    again, info = cls.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert str(summary(again)) == str(summary(model))
    assert summary(again).parameters < summary(again).dense_parameters
    again.save_pretrained(tmp_path / "twice")
    saved_config, twice = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("small", "twice"))
    assert saved_config == twice


def test_calibrated_on_batches(saved, tmp_path):
    cls, folder, dense, inputs = saved
    plain = LowRankConfig(method="svd", param_ratio=0.5, rank_multiple=1)
    calibrated = LowRankConfig(param_ratio=0.5, rank_multiple=1, calibration=[inputs()])
    reference = logits(dense, inputs)
    error = {}
    for name, config in (("plain", plain), ("calibrated", calibrated)):
        model = cls.from_pretrained(folder, lowrank_config=config)
        error[name] = (logits(model, inputs) - reference).norm()
    assert error["calibrated"] < error["plain"], "calibration on the very inputs must help"


def test_in_memory_equals_streaming(saved, tmp_path):
    cls, folder, dense, inputs = saved
    config = LowRankConfig(method="svd", param_ratio=0.5)
    streamed = cls.from_pretrained(folder, lowrank_config=config)
    model = factorize(cls.from_pretrained(folder), config)
    assert torch.equal(logits(model, inputs), logits(streamed, inputs))
    model.save_pretrained(tmp_path / "memory")
    again, info = cls.from_pretrained(tmp_path / "memory", output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_to_dense_needs_no_plugin(saved, tmp_path):
    cls, folder, dense, inputs = saved
    model = cls.from_pretrained(folder, lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    expected = logits(model, inputs)
    names = set(dense.state_dict())
    to_dense(model)
    assert set(model.state_dict()) == names
    assert not factorized(model)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=TOLERANCE)
    model.save_pretrained(tmp_path / "dense_again")
    stored = json.loads((tmp_path / "dense_again" / "config.json").read_text())
    assert "quantization_config" not in stored
    assert "transformers_weights" not in stored
    again, info = cls.from_pretrained(tmp_path / "dense_again", output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_same_seed_same_bits(saved):
    cls, folder, dense, inputs = saved
    config = LowRankConfig(param_ratio=0.5, calibration=[inputs()])
    first, second = (cls.from_pretrained(folder, lowrank_config=config).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bfloat16(saved, tmp_path):
    cls, folder, dense, inputs = saved
    config = LowRankConfig(method="svd", param_ratio=0.5)
    model = cls.from_pretrained(folder, lowrank_config=config, dtype=torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert all(parameter.dtype == torch.bfloat16 for layer in layers for parameter in layer.parameters())
    model.save_pretrained(tmp_path / "small")
    again = cls.from_pretrained(tmp_path / "small")
    state, reloaded = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], reloaded[key]) for key in state)


def test_base_model_of_a_checkpoint_with_a_head(saved, tmp_path):
    cls, folder, dense, inputs = saved
    if dense.base_model is dense:
        pytest.skip(f"{cls.__name__} has no separate base model")
    model = cls.from_pretrained(folder, lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    model.save_pretrained(tmp_path / "small")
    base = type(dense.base_model).from_pretrained(tmp_path / "small")
    prefix = f"{model.base_model_prefix}."
    expected = {name.removeprefix(prefix) for name in factorized(model)}
    assert set(factorized(base)) == expected
    state = model.base_model.state_dict()
    # A pooler that the model with a head never had is new, and random, as without factorization.
    shared = base.state_dict().keys() & state.keys()
    assert shared >= {f"{name}.left.weight" for name in expected if ".experts." not in name}
    assert all(torch.equal(base.state_dict()[key], state[key]) for key in shared)


def test_config_from_the_checkpoint_is_readable(saved, tmp_path):
    cls, folder, dense, inputs = saved
    model = cls.from_pretrained(folder, lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    model.save_pretrained(tmp_path / "small")
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert config.quantization_config["quant_method"] == "lowrank"
    assert set(config.quantization_config["modules"]) == set(factorized(model))
    # A loaded model's own config, given again, loads the same factors.
    again = cls.from_pretrained(tmp_path / "small", config=model.config)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
