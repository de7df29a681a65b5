"""A model card says what is so: of the model, of its recipe, of what was measured, and nothing else."""

import json
import re

import pytest
import torch

import hf_lowrank
from hf_lowrank import Calibration, ConfigError, LowRankConfig, factorize, model_card, summary
from hf_lowrank.integrations.config import RECORDED
from hf_lowrank.integrations.model_card import task_of
from hf_lowrank.testing import tiny_model


IDS = list(range(3, 67)) * 2
SVD = LowRankConfig(method="svd", param_ratio=0.5)


def small(config=SVD, architecture="llama", **options):
    return factorize(tiny_model(architecture)[0], config, **options)


def measured(model, ids=IDS):
    return hf_lowrank.evaluate(model, perplexity={"count": ids})


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "mixtral", "whisper", "vit"])
def test_numbers_are_those_of_the_model(architecture):
    model = small(architecture=architecture)
    found, text = summary(model), model_card(model, "me/small").text
    assert f"| parameters | {found.dense_parameters:,} | {found.parameters:,} |" in text
    assert f"| bytes of weights | {found.dense_bytes:,} | {found.bytes:,} |" in text
    assert f"{found.dense_bytes / found.bytes:.2f}x smaller" in text
    assert f"{len(found.rows)} linear layers are" in text
    rows = re.findall(r"^\| `([\w.]+)` \| `low_rank` \| (\d+) \| ", text, re.MULTILINE)
    assert sum(int(count) for _, count in rows) == len(found.rows), "every layer is in one row"
    assert len({name for name, _ in rows}) == len(rows)
    assert "Not measured" in text


def test_ranks_by_type():
    model = small(LowRankConfig(method="svd", param_ratio=0.5, rank_pattern={"layers.0.mlp.up_proj": 5}))
    row = next(line for line in model_card(model).text.splitlines() if "`model.layers.mlp.up_proj`" in line)
    layers = [row for row in summary(model).rows if row.name.endswith("up_proj")]
    kept = sum(layer.parameters for layer in layers) / sum(layer.dense_parameters for layer in layers)
    error = sum(layer.relative_error for layer in layers) / 2
    ranks = sorted(layer.rank for layer in layers)
    assert row == f"| `model.layers.mlp.up_proj` | `low_rank` | 2 | 5 to {ranks[1]} | {kept:.1%} | {error:.3f} |"


RECIPES = [
    SVD,
    LowRankConfig(method={"name": "svd"}, rank=4, rank_multiple=2, exclude_modules=["v_proj"], seed=3),
    LowRankConfig(method="svd", energy=0.9, format="pivoted", rank_pattern={"up_proj": 9, "o_proj": "dense"}),
    LowRankConfig(param_ratio=0.6, calibration=Calibration(samples=3, length=8, temperature=0.7)),
    LowRankConfig(
        method={"name": "kfac_svd", "joint_groups": [["q_proj", "k_proj", "v_proj"]]},
        calibration=Calibration(samples=2, length=8),
        refine={"name": "blocks", "epochs": 1},
    ),
]


@pytest.mark.parametrize("config", RECIPES, ids=range(len(RECIPES)))
def test_the_code_in_it_makes_the_same_recipe(config):
    model = small(config)
    code = re.search(r"config = (LowRankConfig\(.*?^\))", model_card(model).text, re.DOTALL | re.MULTILINE)[1]
    again = eval(code, {"LowRankConfig": LowRankConfig, "Calibration": Calibration})
    recipe = json.loads(json.dumps(model.config.quantization_config.recipe))
    data = recipe.pop("calibration")
    assert json.loads(json.dumps(again.to_json())) == {k: v for k, v in recipe.items() if k not in RECORDED}
    if data is not None:
        sizes = again.calibration if isinstance(again.calibration, Calibration) else Calibration(again.calibration)
        assert {name: getattr(sizes, name) for name in ("data", "samples", "length", "temperature")} == {
            name: data[name] for name in ("data", "samples", "length", "temperature")
        }


def test_data_that_nobody_else_has_is_left_open():
    batches = [{"input_ids": torch.tensor([IDS])}]
    text = model_card(small(LowRankConfig(param_ratio=0.5), calibration=batches)).text
    assert "calibration=...," in text
    assert "- calibration: `batches`, 128 tokens" in text


def test_a_method_that_is_gone_is_still_named():
    model = small()
    model.config.quantization_config.recipe = {"method": {"name": "bygone", "x": 1}, "rank": 4, "surprise": 1}
    text = model_card(model).text
    assert "- method: `bygone`\n" in text
    assert 'method={"name": "bygone", "x": 1}' in text
    model.config.quantization_config.recipe = {}
    assert "- recipe: not recorded" in model_card(model).text


def test_quality_is_what_was_measured(tmp_path):
    dense, model = tiny_model("llama")[0], small()
    before, after = measured(dense), measured(model)
    text = model_card(model, evaluation=after, dense=before).text
    values = [found.perplexity["count"].perplexity for found in (before, after)]
    assert f"| count, perplexity over 2 x 64 tokens | {values[0]:.2f} | {values[1]:.2f} |" in text
    alone = model_card(model, evaluation=after.to_json()).text
    assert f"| count, perplexity over 2 x 64 tokens | {values[1]:.2f} |" in alone
    for name, found in (("before", before), ("after", after)):
        found.save(tmp_path / f"{name}.json")
    files = model_card(model, evaluation=tmp_path / "after.json", dense=str(tmp_path / "before.json")).text
    assert files == text


def test_of_an_evaluation_alone():
    """What a file of results knows, and no ranks."""
    model = small()
    before, after = measured(tiny_model("llama")[0]), measured(model)
    text = model_card(evaluation=after, dense=before, base_model="org/base", license="mit").text
    whole = model_card(model, evaluation=after, dense=before, base_model="org/base", license="mit").text
    assert set(text.splitlines()) - set(whole.splitlines()) == {
        line for line in text.splitlines() if "in which linear layers are" in line
    }
    assert "`low_rank`" not in text
    assert "x smaller" not in model_card(evaluation=after).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.clear(), "has no 'size', and is no evaluation then; give what hf_lowrank.evaluate"),
        (lambda found: found["size"].pop("parameters"), "has no 'size.parameters'"),
        (lambda found: found["environment"].pop("torch"), "has no 'environment.torch'"),
        (lambda found: found["perplexity"]["count"].pop("windows"), "has no 'perplexity.count.windows'"),
        (lambda found: found.update(perplexity=[]), "holds list, not a dict at 'perplexity'"),
        (lambda found: found.update(data=None), "holds NoneType, not a dict at 'data'"),
    ],
)
def test_what_an_evaluation_lacks_is_named(change, message):
    model = small()
    damaged = measured(model).to_json()
    change(damaged)
    with pytest.raises(ConfigError, match=f"`evaluation` {message}"):
        model_card(model, "me/x", evaluation=damaged)
    with pytest.raises(ConfigError, match=f"`evaluation` {message}"):
        model_card(evaluation=damaged)
    with pytest.raises(ConfigError, match=f"`dense` {message}"):
        model_card(model, "me/x", evaluation=measured(model), dense=damaged)


def test_what_is_no_evaluation_at_all_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    for given, message in ((3, "holds int, not a dict"), (tmp_path / "list.json", "holds list, not a dict")):
        with pytest.raises(ConfigError, match=f"`evaluation` {message}, and is no evaluation then"):
            model_card(small(), evaluation=given)


def test_what_does_not_belong_together_is_refused():
    model = small()
    after = measured(model)
    with pytest.raises(ConfigError, match="different texts, windows or items"):
        model_card(model, evaluation=after, dense=measured(tiny_model("llama")[0], IDS[::-1]))
    with pytest.raises(ConfigError, match="`evaluation` is of a model with .* parameters, and this one has"):
        model_card(small(LowRankConfig(method="svd", param_ratio=0.4)), evaluation=after)
    with pytest.raises(ConfigError, match="is not factorized"):
        model_card(tiny_model("llama")[0])
    with pytest.raises(ConfigError, match="Give `model`, or an `evaluation`"):
        model_card()


def test_metadata_and_command_are_the_callers():
    found = model_card(small(), "me/small", command="make it", license="mit", base_model="org/base", datasets=["a/b"])
    data = found.data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "org/base", ["a/b"])
    assert data["base_model_relation"] == "quantized"
    assert "- command: `make it`" in found.text
    assert "base model's licence, `mit`" in found.text


def test_tasks_by_the_name_of_a_class():
    assert task_of("LlamaForCausalLM") == "text-generation"
    assert task_of("WhisperForConditionalGeneration") == "automatic-speech-recognition"
    assert task_of("SomethingElse") is None
