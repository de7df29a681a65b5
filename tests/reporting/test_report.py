"""A report says what the model says, is the same after it was saved, and refuses what is none."""

import builtins
import copy
import dataclasses
import json
import math
import os
import sys

import pytest
import torch
from torch import nn

from hf_lowrank import (
    ConfigError,
    LowRankConfig,
    LowRankError,
    MissingPackageError,
    Report,
    ResourceError,
    Sample,
    factorize,
    report,
    summary,
)
from hf_lowrank.testing import tiny_model

from .conftest import evaluation


def small(architecture="llama", **options):
    model, _ = tiny_model(architecture)
    return factorize(model, LowRankConfig(**{"method": "svd", "param_ratio": 0.5, **options}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "t5"])
def test_the_content_is_that_of_the_summary(architecture):
    model = small(architecture)
    found, expected = report(model), summary(model)
    for name in ("parameters", "dense_parameters", "bytes", "dense_bytes"):
        assert getattr(found, name) == getattr(expected, name)
    rows = [layer for layer in found.layers if layer.rank is not None]
    assert len(rows) == len(expected.rows)
    for layer, row in zip(rows, expected.rows, strict=True):
        assert {key: getattr(layer, key) for key in dataclasses.asdict(row)} == dataclasses.asdict(row)
        assert layer.kept == row.parameters / row.dense_parameters
    assert found.recipe["method"] == "svd"
    assert found.recipe["param_ratio"] == 0.5
    assert found.model["class"] == type(model).__name__
    assert found.environment["torch"] == torch.__version__


def test_a_reloaded_model_gives_the_same(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    first, second = report(model), report(again)
    assert second.model.pop("name") == tmp_path.name, "of a folder, no more than its name"
    del first.model["name"]
    assert first == second


def test_targets_that_stayed_dense_are_in_their_place():
    model = small(rank_pattern={"layers.0.mlp.gate_proj": "dense"}, exclude_modules=["down_proj"])
    names = [layer.name.removeprefix("model.layers.") for layer in report(model).layers]
    own = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    assert names == [f"{block}.{name}" for block in (0, 1) for name in own]
    layer = report(model).layers[4]
    assert (layer.format, layer.rank, layer.kept, layer.relative_error) == ("dense", None, 1.0, None)
    assert (layer.spectrum, layer.error_share, layer.full_rank) == (None, None, 64)


def test_any_module_will_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    found = report(factorize(model, LowRankConfig(method="svd", param_ratio=0.5)))
    assert [layer.name for layer in found.layers] == ["0", "2"]
    assert (found.recipe, found.budget.name) == (None, None)
    assert found.model == {"name": "", "class": "Sequential", "dtype": "float32"}
    assert f"{found.dense_bytes / found.bytes:.2f}x smaller" in found.html()


def test_shares_of_the_error_are_those_of_n_e_squared():
    model = small("mixtral", rank_pattern={"layers.0.self_attn.q_proj": "dense"})
    layers = [layer for layer in report(model, spectra=False).layers if layer.rank is not None]
    total = sum(layer.dense_parameters * layer.relative_error**2 for layer in layers)
    for layer in layers:
        assert math.isclose(layer.error_share, layer.dense_parameters * layer.relative_error**2 / total)
    assert math.isclose(sum(layer.error_share for layer in layers), 1)


def test_a_dense_model_has_a_report_too():
    model, _ = tiny_model("llama")
    found = report(model)
    assert {layer.format for layer in found.layers} == {"dense"}
    assert "1.00x smaller" in found.html()


def test_without_layers_there_is_still_a_page():
    model = nn.Sequential(nn.Embedding(4, 4))
    for empty in (model, nn.ReLU()):
        assert "No linear layer of this model is a target." in report(empty).html()


def test_saved_and_loaded_it_is_the_same(full, tmp_path):
    full.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["report.html", "report.json"]
    for again in (Report.load(folder), Report.load(folder / "report.json")):
        assert again == full
        assert again.html().encode() == (folder / "report.html").read_bytes()
    saved = json.loads((folder / "report.json").read_text())
    assert saved["version"] == 1
    assert saved == full.to_json()


def test_only_what_is_json_is_kept():
    model = small()
    model.config.quantization_config.recipe["groups"] = (("a", "b"),)
    assert report(model, spectra=False).recipe["groups"] == [["a", "b"]]


def test_a_failure_leaves_what_was_there(full, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")
    real = builtins.open

    def full_disk(file, *args, **kwargs):
        opened = real(file, *args, **kwargs)
        if str(file).endswith("report.html.partial"):
            opened.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        return opened

    monkeypatch.setattr(builtins, "open", full_disk)
    with pytest.raises(ResourceError, match=r"report.html: No space left .* free some space"):
        full.save(tmp_path)
    assert os.listdir(tmp_path) == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_an_absent_package_is_named_before_anything_is_written(full, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'hf-lowrank\[report\]'"):
        full.save(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "does not say `version` 1"),
        (lambda data: data.pop("layers"), r"Report has \['layers'\] too much or too little"),
        (lambda data: data["layers"][0].update(more=1), r"Layer has \['more'\] too much or too little"),
        (lambda data: data["layers"][0].update(parameters="<b>"), "'<b>' is not int"),
        (lambda data: data["layers"][0].update(kept=0), "too much or too little"),
        (lambda data: data["samples"][0].update(prompt=3), "3 is not str"),
        (lambda data: data.update(layers={}), "is not list"),
        (lambda data: data.update(quality={"x": {"perplexity": 1}}), r"`quality`\['x'\] is not an evaluation"),
    ],
)
def test_what_is_no_report_is_refused(full, tmp_path, change, message):
    data = copy.deepcopy(full.to_json())
    change(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        Report.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_nor_is_other_json(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is no report \(.*write one with hf_lowrank.report\(model\).save"):
        Report.load(tmp_path)
    with pytest.raises(ConfigError, match="is no report"):
        Report.load(tmp_path / "absent")


def test_quality_and_samples_of_another_form_are_refused():
    model = small()
    for quality in ({"a": 3}, {"a": {"perplexity": {"t": {}}}}, {"a": object()}):
        with pytest.raises(ConfigError, match=r"`quality`\['a'\] is not an evaluation"):
            report(model, quality=quality)
    for sample in ({"prompt": "x"}, {"prompt": 1, "texts": {}}, {"prompt": "x", "texts": {"a": 1}}, "text"):
        with pytest.raises(ConfigError, match="`samples` holds .*; an entry is"):
            report(model, samples=[sample])
    given = [Sample("x", {"a": "y"}), {"prompt": "x", "texts": {"a": "y"}}]
    assert report(model, samples=given, spectra=False).samples == [given[0], given[0]]


def test_what_evaluate_returns_is_taken_as_it_is(full):
    class Result:
        def to_json(self):
            return evaluation(14.703, 0.68)

    assert report(small(), quality={"dense": Result()}, spectra=False).quality["dense"] == full.quality["dense"]


def test_factors_that_are_not_in_memory_are_named():
    model = small()
    model.model.layers[1].self_attn.o_proj.to("meta")
    with pytest.raises(LowRankError, match=r"layers.1.self_attn.o_proj are on disk .*`spectra=False`"):
        report(model)
    assert len(report(model, spectra=False).layers) == 14
