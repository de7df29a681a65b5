"""A saved model is what the model was: whoever factorized which part of it, and whoever shares its config."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from hf_lowrank import ConfigError, LowRankConfig, auto_fact, factorize, prune_channels, summary, to_dense, truncate
from hf_lowrank.integrations.saving import install_saving
from hf_lowrank.testing import tiny_model


CONFIG = LowRankConfig(method="svd", rank=8)


def output(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs)[0]


def comes_back(model, folder, inputs, auto=AutoModelForCausalLM):
    """The reloaded model, after it was seen to be complete and the same."""
    model.save_pretrained(folder)
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    return loaded


PARTS = {
    "a block": lambda model: factorize(model.model.layers[0], CONFIG),
    "a list of blocks": lambda model: factorize(model.model.layers, CONFIG),
    "by auto_fact": lambda model: auto_fact(model.model.layers[0], 8),
    "the base model": lambda model: factorize(model.model, CONFIG),
    "a layer": lambda model: model.set_submodule(
        "model.layers.1.mlp.up_proj", factorize(model.model.layers[1].mlp.up_proj, CONFIG)
    ),
    "pruned": lambda model: prune_channels(model.model, 0.5, calibration=[{"input_ids": torch.arange(3, 12)[None]}]),
    "two blocks, one after the other": lambda model: [factorize(model.model.layers[i], CONFIG) for i in (1, 0)],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_factorized_is_saved_with_the_whole(part, tmp_path):
    model, inputs = tiny_model("llama")
    PARTS[part](model)
    loaded = comes_back(model, tmp_path / "small", inputs())
    assert len(summary(loaded).rows) == len(summary(model).rows) > 0
    recipe = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe.get("method") != "kfac_svd", "nobody asked for the default"


def test_a_part_of_a_composite_and_the_whole(tmp_path):
    model, inputs = tiny_model("llava")
    factorize(model.model.language_model, CONFIG)
    loaded = comes_back(model, tmp_path / "whole", inputs(), type(model))
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())["text_config"]
    assert len(summary(loaded).rows) == len(summary(model).rows)
    whole, _ = tiny_model("llava")
    factorize(whole, CONFIG)
    text = {"input_ids": torch.arange(3, 12)[None]}
    comes_back(whole.model.language_model, tmp_path / "text", text, AutoModel)
    comes_back(whole, tmp_path / "again", inputs(), type(model))


def test_what_has_changed_since_is_saved_as_it_is_now(tmp_path):
    model, inputs = tiny_model("llama")
    factorize(model, CONFIG)
    truncate(model, 4)
    base = comes_back(model.model, tmp_path / "base", inputs(), AutoModel)
    assert {row.rank for row in summary(base).rows} == {4}
    to_dense(model.model.layers[0])
    assert all(".layers.1." in row.name for row in summary(comes_back(model, tmp_path / "half", inputs())).rows)
    to_dense(model.model)
    assert summary(comes_back(model, tmp_path / "dense", inputs())).rows == []
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_models_with_one_config_do_not_write_into_each_other(tmp_path):
    first, inputs = tiny_model("llama")
    second, third = (LlamaForCausalLM(first.config).eval() for _ in range(2))
    factorize(first, CONFIG)
    factorize(second, LowRankConfig(method="svd", rank=4))
    for turn in ("once", "twice"):
        assert {row.rank for row in summary(comes_back(first, tmp_path / turn / "8", inputs())).rows} == {8}
        assert {row.rank for row in summary(comes_back(second, tmp_path / turn / "4", inputs())).rows} == {4}
        assert summary(comes_back(third, tmp_path / turn / "dense", inputs())).rows == []
    to_dense(second)
    comes_back(first, tmp_path / "first", inputs())
    comes_back(second, tmp_path / "second", inputs())
    made = AutoModelForCausalLM.from_config(first.config)
    assert summary(comes_back(made, tmp_path / "made", inputs())).rows == []


def test_saving_changes_nothing_in_memory(tmp_path):
    model, inputs = tiny_model("llama")
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "dense")
    before = model.config.to_dict()
    factorize(model.model.layers[0], CONFIG)
    model.save_pretrained(tmp_path / "one")
    assert model.config.to_dict() == before
    assert getattr(model, "hf_quantizer", None) is None
    first = (tmp_path / "one" / "config.json").read_bytes()
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "config.json").read_bytes() == first
    comes_back(twin, tmp_path / "twin", inputs())


def test_factors_beside_weights_that_another_quantizer_packed_are_refused(tmp_path):
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from transformers import TorchAoConfig

    model, _ = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    config = TorchAoConfig(
        torchao.quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["model.layers.0", "lm_head"]
    )
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    factorize(packed.model.layers[0], CONFIG)
    with pytest.raises(ConfigError, match="holds 7 factorized layers, such as .* is quantized with .*torchao"):
        packed.save_pretrained(tmp_path / "both")


def test_it_is_installed_once():
    from transformers import PreTrainedModel

    before = PreTrainedModel.save_pretrained
    install_saving()
    assert PreTrainedModel.save_pretrained is before


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "projection_dim": 32,
    "text_config": {"vocab_size": 96, "max_position_embeddings": 64, "projection_dim": 32, **SIZES},
    "vision_config": {"image_size": 16, "patch_size": 8, "projection_dim": 32, **SIZES},
}


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def towers(request, tmp_path_factory):
    """(name, folder of the factorized composite, folder of the same multiplied out)."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}Model")(
        getattr(transformers, f"{request.param}Config")(**copy.deepcopy(TOWERS))
    )
    factorize(model, CONFIG).save_pretrained(folder / "small")
    to_dense(model).save_pretrained(folder / "dense")
    return request.param, folder / "small", folder / "dense"


@pytest.mark.parametrize("part", ["TextModel", "VisionModel", "TextModelWithProjection", "VisionModelWithProjection"])
def test_a_class_that_is_a_part_of_a_composite_loads_its_factors(towers, part, tmp_path):
    name, small, dense = towers
    cls = getattr(transformers, name + part, None)
    if cls is None:
        pytest.skip(f"there is no {name + part}")
    model, info = cls.from_pretrained(small, output_loading_info=True)
    expected, dense_info = cls.from_pretrained(dense, output_loading_info=True)
    assert info["missing_keys"] == dense_info["missing_keys"] == set()
    assert summary(model).rows
    model.save_pretrained(tmp_path / "part")
    again = cls.from_pretrained(tmp_path / "part")
    for loaded in (model, again):
        state = to_dense(loaded).state_dict()
        assert state.keys() == expected.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[key], tensor)


def test_a_config_that_does_not_tell_of_the_factors(towers):
    name, small, _ = towers
    cls = getattr(transformers, f"{name}VisionModel")
    expected = cls.from_pretrained(small).state_dict()
    config = getattr(transformers, f"{name}VisionConfig")(**TOWERS["vision_config"])
    for loaded in (cls.from_pretrained(small, config=config), AutoModel.from_pretrained(small, config=config)):
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert not hasattr(config, "quantization_config"), "the caller's object is not written to"


def test_a_part_that_was_left_dense(tmp_path):
    model = transformers.CLIPModel(transformers.CLIPConfig(**copy.deepcopy(TOWERS)))
    factorize(model, LowRankConfig(method="svd", rank=8, target_modules="text_model.*proj")).save_pretrained(tmp_path)
    part, info = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not summary(part).rows and not hasattr(part.config, "quantization_config")
    assert all(torch.equal(t, model.vision_model.state_dict()[key]) for key, t in part.state_dict().items())


def test_the_guard_of_the_parts_goes_with_the_factors(towers, tmp_path):
    name, small, dense = towers
    assert json.loads((small / "config.json").read_text())["vision_config"]["transformers_weights"]
    loaded = getattr(transformers, f"{name}Model").from_pretrained(small)
    to_dense(loaded).save_pretrained(tmp_path / "multiplied_out")
    AutoModel.from_config(AutoConfig.from_pretrained(small)).save_pretrained(tmp_path / "fresh")
    for folder in (dense, tmp_path / "multiplied_out", tmp_path / "fresh"):
        assert "transformers_weights" not in (folder / "config.json").read_text()
