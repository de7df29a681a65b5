"""Every wrong argument is refused before loading starts, by a message that names it, its value and the cure."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM

import hf_lowrank
from hf_lowrank import CheckpointError, LowRankConfig
from hf_lowrank.testing import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama")[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "fsvd"},
            "UnknownNameError",
            r"Unknown method 'fsvd'; choose one of \['anchored_svd', 'asvd', 'awsvd', 'basis_sha",
        ),
        ({"method": {"name": "svd", "alpha": 1}}, "ConfigError", r"method 'svd' has no option \['alpha'\]"),
        ({"method": 3}, "ConfigError", "`method` must be a registered name"),
        ({"allocation": "fair"}, "UnknownNameError", "Unknown allocation 'fair'"),
        ({"format": "zip"}, "UnknownNameError", "Unknown format 'zip'"),
        ({"param_ratio": 0}, "ConfigError", r"`param_ratio`=0 must be in \(0, 1\]"),
        ({"param_ratio": 1.2}, "ConfigError", r"`param_ratio`=1.2 must be in \(0, 1\]"),
        ({"param_ratio": float("nan")}, "ConfigError", r"`param_ratio`=nan must be in \(0, 1\]"),
        ({"param_ratio": "0.8"}, "ConfigError", r"`param_ratio`='0.8' must be in \(0, 1\]"),
        ({"param_ratio": 0.5, "rank": 4}, "ConfigError", r"Give one budget, not \['param_ratio', 'rank'\]"),
        ({"rank": 0}, "ConfigError", "`rank`=0 must be an integer of at least 1"),
        ({"target_params": 0.5}, "ConfigError", "`target_params`=0.5 must be an integer"),
        ({"target_bytes": 1e6}, "ConfigError", "`target_bytes`=1000000.0 must be an integer"),
        ({"target_bytes": 5, "energy": 0.9}, "ConfigError", r"Give one budget, not \['target_bytes', 'energy'\]"),
        ({"energy": 0}, "ConfigError", r"`energy`=0 must be in \(0, 1\]: the share of the squared weight"),
        ({"energy": True}, "ConfigError", r"`energy`=True must be in \(0, 1\]"),
        ({"rank_pattern": {"q_proj": 1.5}}, "ConfigError", r"`rank_pattern`\['q_proj'\]=1.5 must be an integer"),
        ({"rank_pattern": {"(": 8}}, "ConfigError", r"`rank_pattern` key '\(' is not a regular expression"),
        ({"rank_multiple": 0}, "ConfigError", "`rank_multiple`=0 must be an integer of at least 1"),
        ({"target_modules": []}, "ConfigError", r"`target_modules`=\[\] must be a regular expression, or a non-empty"),
        ({"seed": -1}, "ConfigError", "`seed`=-1"),
        ({"seed": 2**70}, "ConfigError", "`seed`=1180591620717411303424 must be an integer in 0 .. 2"),
    ],
)
def test_refused_when_the_config_is_made(options, error, message):
    with pytest.raises(getattr(hf_lowrank, error), match=message):
        LowRankConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 65}, "RankError", r"rank=65 for .* must be an integer in 1\.\.64 = min\(out, in\)"),
        ({"rank_pattern": {"k_proj": 33}}, "RankError", r"rank=33 for .*k_proj must be an integer in 1\.\.32"),
        ({"rank_pattern": {"query": 8}}, "TargetError", r"`rank_pattern` has keys that match no targeted linear"),
        (
            {"target_modules": ["query"]},
            "TargetError",
            "`target_modules`='query' matches no linear layer or convolution; the model has",
        ),
        ({"target_modules": ["q_proj", "query"]}, "TargetError", "`target_modules`='query' matches no linear"),
        ({"target_modules": ".*query"}, "TargetError", r"`target_modules`='.\*query' matches no linear layer"),
        ({"target_modules": "("}, "ConfigError", r"`target_modules`='\(' is not a regular expression"),
        ({"exclude_modules": ["query"]}, "TargetError", "`exclude_modules`='query' matches no linear layer"),
        ({"exclude_modules": "all-linear"}, "TargetError", "`exclude_modules`='all-linear' matches no linear layer"),
        ({"exclude_modules": "all-layers"}, "TargetError", "`exclude_modules`='all-layers' matches no linear layer"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ".*"},
            "TargetError",
            "leaves no linear layer to factorize",
        ),
        ({"method": "whitened_svd", "calibration": None}, "CalibrationError", "`calibration` is None"),
        ({"method": "whitened_svd", "calibration": []}, "CalibrationError", "`calibration` is an empty list"),
        ({"method": "whitened_svd", "calibration": 3}, "CalibrationError", "`calibration`=3 is neither a name"),
        ({"method": "whitened_svd", "calibration": ""}, "CalibrationError", "`calibration`='' is neither a name"),
        ({"method": "whitened_svd", "calibration": torch.tensor(1)}, "CalibrationError", "is neither a name"),
        ({"method": "whitened_svd", "calibration": "no.jsonl"}, "CalibrationError", "'no.jsonl' does not exist"),
        ({"method": "whitened_svd", "calibration": "no.safetensors"}, "CalibrationError", "does not exist"),
        ({"method": "whitened_svd", "calibration": [torch.ones(2)]}, "CalibrationError", "not a dict of tensors"),
        ({"method": "whitened_svd", "calibration": ["one"]}, "CalibrationError", "tokenizer"),
    ],
)
def test_refused_before_loading(llama, options, error, message, monkeypatch):
    config = LowRankConfig(**{"method": "svd", **options})
    with pytest.raises(getattr(hf_lowrank, error), match=message):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)


def test_self_calibration_needs_a_language_model(tmp_path):
    model, _ = tiny_model("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        hf_lowrank.CalibrationError, match="samples text from a causal language model, which BertForMas"
    ):
        type(model).from_pretrained(tmp_path, lowrank_config=LowRankConfig())


def test_both_keywords(llama):
    with pytest.raises(hf_lowrank.ConfigError, match="either `lowrank_config` or `quantization_config`"):
        AutoModelForCausalLM.from_pretrained(
            llama, lowrank_config=LowRankConfig(), quantization_config=LowRankConfig()
        )
    with pytest.raises(hf_lowrank.ConfigError, match="must be a LowRankConfig or a dict, not int"):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=3)
    with pytest.raises(hf_lowrank.ConfigError, match=r"no option \['ratio'\]"):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config={"ratio": 0.5})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_keep_their_type_and_name_the_layer(llama, tmp_path, value):
    state = load_file(llama / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    for config in (LowRankConfig(method="svd"), LowRankConfig(calibration=[{"input_ids": torch.ones(1, 4).long()}])):
        with pytest.raises(hf_lowrank.NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj.* 1 NaN or infinite"):
            AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(hf_lowrank.NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        hf_lowrank.factorize(model, LowRankConfig(method="svd"))
    assert not hf_lowrank.summary(model).rows, "a refused model is as it was"


def test_overflowing_activations(llama, tmp_path):
    state = load_file(llama / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] *= 1e20
    state["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    config = LowRankConfig(calibration=[{"input_ids": torch.arange(3, 20)[None]}])
    with pytest.raises(hf_lowrank.StatisticsError, match="hold NaN or infinite values"):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (torch.OutOfMemoryError("20 GiB"), r"^20 GiB \(while model\.\S+ of shape .*; `compute_device='cpu'` needs no"),
        (MemoryError("all of it"), r"^all of it \(while model\.\S+ of shape .* was factorized\)$"),
        (ZeroDivisionError("by nothing"), "^by nothing$"),
        (RuntimeError("of a kernel"), "^of a kernel$"),
    ],
)
@pytest.mark.parametrize("options", [{"method": "svd"}, {"method": "svd", "energy": 0.9}])
def test_a_factorization_that_fails_ends_the_load_in_its_own_way(llama, monkeypatch, raised, message, options):
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise raised

    for name in ("factorize", "energies"):
        monkeypatch.setattr(type(LowRankConfig(**options).method), name, fails)
    with pytest.raises(type(raised), match=message) as failed:
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(**options))
    assert type(failed.value) is type(raised)
    assert len(calls) == 1


@pytest.mark.parametrize("device_map", ["meta", {"": "meta"}, {"model": "cpu", "lm_head": torch.device("meta")}])
def test_nothing_can_be_factorized_on_meta(llama, device_map, tmp_path):
    with pytest.raises(hf_lowrank.ConfigError, match="on 'meta', where there are no weights to factorize"):
        AutoModelForCausalLM.from_pretrained(llama, device_map=device_map, lowrank_config=LowRankConfig())
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(method="svd"))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta").device.type == "meta"


def test_unreadable_checkpoint(llama, tmp_path):
    data = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(hf_lowrank.CheckpointError, match="Cannot read .*model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=LowRankConfig(method="svd"))


def test_statistics_of_another_model(llama, tmp_path):
    other, inputs = tiny_model("gpt2")
    hf_lowrank.collect_statistics(other, [inputs()]).save(tmp_path / "gpt2.safetensors")
    config = LowRankConfig(calibration=str(tmp_path / "gpt2.safetensors"))
    with pytest.raises(hf_lowrank.StatisticsError, match="of another model: they miss 14 of 14 modules"):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.update(version=2), "config version 2, this hf_lowrank reads version 1"),
        (lambda q: q["modules"]["model.layers.0.self_attn.q_proj"].update(format="zip"), "knows the formats"),
        (lambda q: q["modules"]["model.layers.0.self_attn.q_proj"].update(rank=4096), "rank=4096"),
        (lambda q: q.update(modules={"elsewhere": {"format": "low_rank", "rank": 2}}), "14 layers are factorized in"),
        (lambda q: q.update(modules=[]), "is list, not a dict"),
    ],
)
def test_damaged_config(llama, tmp_path, edit, message):
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(method="svd"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_lowrank.LowRankError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["kfac_svd", "compot", "sparse_low_rank", "hybrid"])
def test_damaged_integers_are_named(method, tmp_path):
    model, inputs = tiny_model("llama")
    hf_lowrank.factorize(model, LowRankConfig(method=method, param_ratio=0.6), calibration=[inputs()])
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    tensors[name] = tensors[name].clone().fill_(3)
    save_file(tensors, path, {"format": "pt"})
    layer, _, leaf = name.rpartition(".")
    with pytest.raises(CheckpointError, match=f"`{leaf}` of {layer} .* may be damaged: download or save it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_architecture(tmp_path):
    model, _ = tiny_model("llava")
    hf_lowrank.factorize(model, LowRankConfig(method="svd")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="None of the 28 .* is in LlamaForCausalLM; .* Load the class it was"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_recipe_nobody_knows_any_more_still_loads(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(method="svd"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["recipe"] = {"method": "vanished", "temperature": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.to_dict()["recipe"] == {"method": "vanished", "temperature": 3}


def test_a_factorized_checkpoint_wins_over_a_config(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=LowRankConfig())
    assert str(hf_lowrank.summary(again)) == str(hf_lowrank.summary(model))


def test_new_heads_are_left_alone(tmp_path):
    model, _ = tiny_model("bert")
    model.save_pretrained(tmp_path)
    config = LowRankConfig(method="svd", param_ratio=0.5, target_modules=["query", "classifier", "dense"])
    model, info = BertForSequenceClassification.from_pretrained(
        tmp_path, lowrank_config=config, output_loading_info=True
    )
    assert type(model.classifier) is torch.nn.Linear
    assert info["missing_keys"] == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    assert not model.classifier.weight.is_meta
