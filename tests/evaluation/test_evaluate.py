"""A result says what was measured, on what, and how to do it again; presets are the protocols they are named after."""

import json

import pytest
import torch

from hf_lowrank import ConfigError, EvaluationError, LowRankConfig, PerplexityTask, evaluate, factorize, summary
from hf_lowrank.evaluation import PRESETS, multiple_choice, perplexity, size_of
from hf_lowrank.provenance import command
from hf_lowrank.testing import tiny_model


TEXT = "The cat sat on the mat. " * 40
ITEMS = [{"question": "The cat", "choices": ["sat", "ran"], "label": 0}] * 3


def test_the_result_is_json_with_its_provenance(model, tokenizer, tmp_path):
    result = evaluate(model, tokenizer, perplexity=TEXT, multiple_choice={"mine": ITEMS})
    result.save(tmp_path / "quality.json")
    saved = json.loads((tmp_path / "quality.json").read_text())
    assert saved == result.to_json()
    assert saved["perplexity"]["text"]["window"] == 64, "as many as the model has positions"
    assert saved["multiple_choice"]["mine"]["items"] == 3
    assert saved["mean_accuracy"] == result.multiple_choice["mine"].acc_norm
    assert saved["model"]["quantization"]["quant_method"] == "lowrank"
    assert saved["model"]["quantization"]["recipe"]["param_ratio"] == 0.8
    assert saved["size"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(saved["environment"]) >= {"torch", "transformers", "hf-lowrank", "python"}
    assert saved["command"].startswith("python ")
    assert len(saved["data"]["text"]["sha256"]) == 64
    for part in ("text: perplexity", "mine: acc_norm", "parameters"):
        assert part in str(result)


def test_measures_the_same_twice(model, tokenizer):
    first, second = (evaluate(model, tokenizer, perplexity=TEXT, multiple_choice={"m": ITEMS}) for _ in range(2))
    assert (first.perplexity, first.multiple_choice) == (second.perplexity, second.multiple_choice)


def test_the_tokenizer_beside_the_model_is_found(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="no tokenizer could be loaded from"):
        evaluate(type(model).from_pretrained(tmp_path), perplexity=TEXT)
    tokenizer.save_pretrained(tmp_path)
    found = evaluate(type(model).from_pretrained(tmp_path), perplexity=TEXT)
    assert found.perplexity == evaluate(model, tokenizer, perplexity=TEXT).perplexity
    assert found.model["name"] == tmp_path.name


def test_lowrank_arena_is_the_published_protocol():
    preset = PRESETS["lowrank_arena"]
    wikitext, c4 = preset.perplexity["wikitext2"], preset.perplexity["c4"]
    assert (wikitext.window, wikitext.max_windows, wikitext.join, wikitext.bos) == (2048, None, "text", False)
    assert (c4.window * c4.max_windows, c4.join, c4.bos, c4.split) == (262_144, "tokens", False, "validation")
    assert {name: task.metric for name, task in preset.multiple_choice.items()} == {
        "arc_challenge": "acc_norm", "arc_easy": "acc_norm", "boolq": "acc", "hellaswag": "acc_norm",
        "openbookqa": "acc_norm", "piqa": "acc_norm", "winogrande": "acc",
    }  # fmt: skip


def test_a_preset_takes_local_data_and_leaves_entries_out(model, tokenizer, monkeypatch):
    # The tiny model has 64 positions.
    small = PerplexityTask("owner/absent", window=32, max_windows=5)
    monkeypatch.setitem(PRESETS["lowrank_arena"].perplexity, "wikitext2", small)
    result = evaluate(
        model, tokenizer, preset="lowrank_arena", perplexity={"wikitext2": TEXT, "c4": None}, multiple_choice={}
    )
    assert list(result.perplexity) == ["wikitext2"]
    assert (result.perplexity["wikitext2"].window, result.perplexity["wikitext2"].windows) == (32, 5)
    assert (result.preset, result.multiple_choice) == ("lowrank_arena", {})
    less = evaluate(
        model, tokenizer, preset="lowrank_arena", perplexity={"wikitext2": TEXT, "c4": None}, multiple_choice={},
        max_windows=2,
    )  # fmt: skip
    assert less.perplexity["wikitext2"].windows == 2


def test_without_the_hub_a_preset_says_what_to_give(model, tokenizer):
    with pytest.raises(EvaluationError, match=r"'Salesforce/wikitext:wikitext-2-raw-v1'.*Give a .txt or a .jsonl"):
        evaluate(model, tokenizer, preset="lowrank_arena")


def test_refuses(model, tokenizer):
    with pytest.raises(ConfigError, match="There is nothing to measure; give `perplexity`"):
        evaluate(model, tokenizer)
    with pytest.raises(ConfigError, match=r"`preset`='arena' must be one of \['lowrank_arena'\]"):
        evaluate(model, tokenizer, preset="arena")


@pytest.mark.parametrize(
    ("architecture", "format"),
    [("llama", None), ("llama", "pivoted"), ("llama_tied", None), ("gpt2", None), ("mixtral", None)],
)
def test_sizes_are_those_of_the_summary(architecture, format):
    model, _ = tiny_model(architecture)
    dense = size_of(model)
    report = summary(model)
    assert (dense.parameters, dense.bytes) == (report.parameters, report.bytes)
    model = factorize(model.bfloat16(), LowRankConfig(method="svd", param_ratio=0.5, format=format))
    small, report = size_of(model), summary(model)
    assert (small.parameters, small.bytes) == (report.parameters, report.bytes)
    saved = report.dense_parameters - report.parameters
    assert small.linear_parameters == dense.linear_parameters - saved
    integers = sum(b.numel() for b in model.buffers() if b.dtype == torch.int32)
    assert small.linear_bytes == 2 * small.linear_parameters + 2 * integers
    assert (format == "pivoted") == (integers > 0)


def test_packed_weights_count_as_they_are_stored():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 8, bias=False))
    torchao.quantize_(model[:1], torchao.Int8WeightOnlyConfig())
    size = size_of(model)
    # A byte a weight, a float32 scale and an int8 zero point a row; the other stays float32.
    assert size.bytes == 64 * 32 + 5 * 32 + 4 * 64 * 8
    assert size.parameters == 64 * 40


def test_the_command_tells_no_secrets(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/run.py", "--token", "hf_" + "a1" * 17, "--data", "/data/x", "here/y"])
    assert command() == "python run.py --token hf_*** --data x here/y"


@pytest.mark.parametrize("architecture", ["bert", "t5", "vit", "whisper"])
def test_what_is_no_causal_language_model_is_refused(architecture, tokenizer):
    model, _ = tiny_model(architecture)
    ids, items = torch.arange(3, 80), [{"question": "a", "choices": ["b", "c"], "label": 0}]
    for measure in (
        lambda: evaluate(model, tokenizer, perplexity=PerplexityTask(ids, window=16)),
        lambda: perplexity(model, ids, 16),
        lambda: multiple_choice(model, tokenizer, items),
    ):
        with pytest.raises(EvaluationError, match=f"measures causal language models, which {type(model).__name__} is"):
            measure()


def test_the_text_decoder_of_a_model_that_reads_images_is_measured():
    model, _ = tiny_model("llava")
    ids = torch.arange(3, 80)
    found = evaluate(model, perplexity=PerplexityTask(ids, window=16)).perplexity["text"]
    assert found.windows == 4
    with torch.no_grad():
        logits = model(input_ids=ids[:16][None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:16]).item()
    assert perplexity(model, ids, 16, max_windows=1).nll == pytest.approx(expected, rel=1e-5)
