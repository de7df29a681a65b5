"""Every command from the outside: what it prints, what it makes, how it ends."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import command
from hub import Hub
from processes import run_without
from transformers import AutoModelForCausalLM
from words import word_tokenizer

import hf_lowrank
from hf_lowrank import LowRankConfig, summary, to_dense
from hf_lowrank.files import sha256_of
from hf_lowrank.testing import tiny_model


SVD = ["--method", "svd", "--param-ratio", "0.5"]
SMALL = ["--calibration-samples", "3", "--calibration-length", "10"]
TEXT = " ".join(f"w{(7 * i) % 90 + 5}" for i in range(600))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny language model with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama")[0].save_pretrained(folder, max_shard_size="60KB")
    word_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def small(dense, tmp_path_factory):
    """What `factorize` makes of it, and how the command ended."""
    target = tmp_path_factory.mktemp("small") / "made"
    return target, command("factorize", dense, target, *SVD, "--json")


def hashes(folder):
    return {path.name: sha256_of(path) for path in Path(folder).iterdir()}


def fails(done, code, *words):
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_factorize_json_is_one_document(small, dense):
    target, done = small
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["folder"] == str(target)
    assert document["recipe"]["method"] == "svd" and document["recipe"]["param_ratio"] == 0.5
    assert document["record"]["files"] == {k: v for k, v in hashes(target).items() if k != "factorization.json"}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert document["line"] == summary(model).line
    assert [row["rank"] for row in document["summary"]["rows"]] == [row.rank for row in summary(model).rows]
    loaded = AutoModelForCausalLM.from_pretrained(dense, lowrank_config=LowRankConfig(method="svd", param_ratio=0.5))
    assert torch.equal(logits(model), logits(loaded))
    assert "Factorizing" in done.err, "a progress bar"


def test_factorize_prints_a_table_and_its_recipe_gives_the_same_files(small, dense, tmp_path):
    target, _ = small
    assert yaml.safe_load((target / "recipe.yaml").read_text())["param_ratio"] == 0.5
    done = command("factorize", dense, tmp_path / "again", "--config", target / "recipe.yaml")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split()[:3] == ["module", "format", "rank"]
    assert done.out.splitlines()[-1] == str(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(target)
    options = ["--config", target / "recipe.yaml", "--rank", "6", "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert command("factorize", dense, tmp_path / "other", *options).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert {row.rank for row in summary(model).rows} == {6}
    assert model.dtype == torch.bfloat16
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    recipe = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    assert (recipe["dtype"], recipe["max_shard_size"], recipe["rank"]) == ("bfloat16", "20KB", 6)
    assert "param_ratio" not in recipe


def test_errors_and_exit_codes(small, dense, tmp_path):
    target, _ = small
    fails(command("factorize", dense, target, "--rank", "4"), 1, "ConfigError: `target`=", "is there already")
    fails(command("factorize", dense, tmp_path / "x", "--method", "sdv"), 1, "Unknown method 'sdv'; choose one of")
    fails(command("factorize", tmp_path / "none", tmp_path / "x"), 1, "There is no model that can be read at")
    bad = tmp_path / "recipe.yaml"
    bad.write_text("methud: svd")
    fails(command("factorize", dense, tmp_path / "x", "--config", bad), 1, "has no option ['methud']")
    fails(command("factorize", dense, tmp_path / "x", "--rank", "many"), 2, "invalid int value: 'many'")
    fails(command("factorize", dense, tmp_path / "x", "--methud", "svd"), 2, "unrecognized arguments: --methud")
    fails(command("factorize", dense), 2, "the following arguments are required: out")
    fails(command("wobble"), 2, "invalid choice: 'wobble'")
    refused = ["ConfigError: `dtype`='float99'", "a floating-point dtype of torch"]
    fails(command("factorize", dense, tmp_path / "x", *SVD, "--dtype", "float99"), 1, *refused)
    fails(
        command("calibrate", dense, tmp_path / "x.safetensors", "--dtype", "float8_e4m3fn"), 1, "'float8_e4m3fn' must"
    )
    fails(command("evaluate", dense, "--perplexity", dense / "text.txt", "--dtype", "float99"), 1, *refused)
    bad.write_text("dtype: int8")
    fails(command("factorize", dense, tmp_path / "x", "--config", bad), 1, "ConfigError: `dtype`='int8'")
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_calibrate_once_and_factorize_from_it(dense, tmp_path):
    file = tmp_path / "statistics.safetensors"
    options = ["--method", "whitened_svd", "--calibration", dense / "text.txt", *SMALL]
    done = command("calibrate", dense, file, *options, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["statistics"], document["modules"]) == (["input_gram"], 14)
    assert document["provenance"]["data"] == "text.txt" and document["provenance"]["tokens"] == 30
    assert document["bytes"] == file.stat().st_size
    assert os.listdir(tmp_path) == [file.name]
    done = command("calibrate", dense, file, *options, "--allocation", "sensitivity", "--json")
    assert json.loads(done.out)["statistics"] == ["input_gram", "weight_gradient"], done.err
    in_memory = command("calibrate", dense, tmp_path / "all.safetensors", *options, "--in-memory")
    assert in_memory.out.startswith(f"{tmp_path / 'all.safetensors'}: input_gram of 14 modules")
    name = "model.layers.1.mlp.down_proj"
    found = [hf_lowrank.Statistics.load(p).get(name, ["input_gram"])["input_gram"] for p in sorted(tmp_path.iterdir())]
    torch.testing.assert_close(*found)
    command(
        "factorize", dense, tmp_path / "a", "--method", "whitened_svd", "--calibration", file, "--param-ratio", "0.5"
    )
    config = LowRankConfig(method="whitened_svd", calibration=str(file), param_ratio=0.5)
    loaded = AutoModelForCausalLM.from_pretrained(dense, lowrank_config=config)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), logits(loaded))
    fails(command("calibrate", dense, tmp_path / "x.bin"), 1, "the name of a statistics file ends in .safetensors")
    fails(command("calibrate", dense, tmp_path / "x.safetensors", "--method", "svd"), 1, "needs no statistics")
    assert not list(tmp_path.glob("x*"))


def test_inspect(small, dense, tmp_path):
    target, _ = small
    document = json.loads(command("inspect", dense, "--json", "--energy", "0.5").out)
    matrix = next(entry for entry in document["matrices"] if entry["name"] == "model.layers.0.mlp.up_proj.weight")
    weight = AutoModelForCausalLM.from_pretrained(dense).model.layers[0].mlp.up_proj.weight.detach().double()
    squares = torch.linalg.svdvals(weight) ** 2
    needed = int((squares.cumsum(0) / squares.sum() < 0.5).sum()) + 1
    assert (matrix["energy_rank"], matrix["numerical_rank"], matrix["full_rank"]) == (needed, 64, 64)
    assert {entry["type"] for entry in document["types"]} >= {"q_proj", "down_proj", "embed_tokens"}
    assert "rank at 90% energy" in command("inspect", dense).out
    factorized = json.loads(command("inspect", target, "--json").out)
    assert factorized["summary"]["rows"][0]["format"] == "low_rank"
    fails(command("inspect", tmp_path), 1, "There are no safetensors files in")
    fails(command("inspect", dense, "--energy", "2"), 1, "`energy`=2.0 must be in (0, 1]")


def test_evaluate(small, dense, tmp_path):
    target, _ = small
    items = [{"question": "w5 w6", "choices": ["w7", "w8"], "label": 0}] * 3
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, items)))
    texts = ["--perplexity", dense / "text.txt", f"again={dense / 'text.txt'}", "--max-windows", "2"]
    tasks = ["--multiple-choice", f"own={tmp_path / 'own.jsonl'}", "--limit", "2"]
    done = command("evaluate", target, *texts, *tasks, "--json", "--output", tmp_path / "quality.json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert json.loads((tmp_path / "quality.json").read_text()) == document
    model = AutoModelForCausalLM.from_pretrained(target)
    expected = hf_lowrank.evaluate(model, perplexity=str(dense / "text.txt"), max_windows=2).perplexity["text"]
    assert document["perplexity"]["text"]["perplexity"] == expected.perplexity
    assert document["perplexity"]["again"] == document["perplexity"]["text"]
    assert document["multiple_choice"]["own"]["items"] == 2
    assert "own: acc" in command("evaluate", target, *tasks).out
    fails(command("evaluate", target), 1, "There is nothing to measure")
    fails(command("evaluate", target, "--perplexity", "none.txt"), 1, "none.txt")
    fails(command("evaluate", target, *texts, "--dtype", "foo"), 1, "ConfigError: `dtype`='foo'", "'bfloat16'")
    nowhere = ["--output", tmp_path / "none" / "x.json"]
    # The model is not even looked for.
    fails(command("evaluate", "no model", *texts, *nowhere), 1, "ConfigError: `--output`=", "a folder that is not")
    fails(command("evaluate", "no model", *texts, "--output", tmp_path), 1, "is a folder; name a file in it")
    fails(command("evaluate", target, "--multiple-choice", "own=x.jsonl", "piqa"), 1, "gives ['piqa'] no file")


def test_to_dense_loads_without_the_package(small, dense, tmp_path):
    target, _ = small
    done = command("to-dense", target, tmp_path / "dense", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["summary"]["rows"] == []
    expected = logits(to_dense(AutoModelForCausalLM.from_pretrained(target)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    folder = str(tmp_path / "dense")
    load = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({folder!r}); print('fine')"
    assert run_without(("hf_lowrank", "_hf_lowrank_autoload"), load).stdout.strip() == "fine"
    fails(command("to-dense", target, tmp_path / "dense"), 1, "OUT is", "is there already")
    fails(command("to-dense", dense, tmp_path / "x"), 1, "is not factorized")
    assert os.listdir(tmp_path) == ["dense"]


def on_the_hub(hub, home, *arguments):
    """A command in a process of its own: huggingface_hub reads the environment when it is imported."""
    program = Path(sys.executable).with_name("optimum-cli")
    command = [sys.executable, program, "lowrank", *map(str, arguments), "--json"]
    environment = {**os.environ, **hub.environment(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_from_the_hub_and_back(small, dense, tmp_path):
    target, _ = small
    with Hub() as hub:
        hub.folder("me/dense", dense)
        made = on_the_hub(hub, tmp_path / "home", "factorize", "me/dense", tmp_path / "made", *SVD)
        assert on_the_hub(hub, tmp_path / "home", "push", tmp_path / "made", "me/small")["repository"] == "me/small"
        commits = [request for request in hub.requests if request.startswith("POST") and "/commit/" in request]
        pushed, card = hub.repositories["me/small"], hub.card("me/small")
    found, same = hashes(tmp_path / "made"), hashes(target)
    told = {"config.json", "factorization.json"}
    assert {name: found[name] for name in found if name not in told} == {n: same[n] for n in same if n not in told}
    here, there = (json.loads((folder / "config.json").read_text()) for folder in (target, tmp_path / "made"))
    assert there["quantization_config"]["recipe"].pop("base_model") == "me/dense"
    assert there == here, "whether the model is in a folder or on the Hub"
    assert made["record"]["sources"] == {path.name: sha256_of(path) for path in dense.glob("*.safetensors")}
    made_on_the_hub = {".gitattributes", "README.md"}
    assert {
        name: hashlib.sha256(data).hexdigest() for name, data in pushed.items() if name not in made_on_the_hub
    } == found
    assert len(commits) == 1, "the card comes with the weights"
    assert card.data.base_model == "me/dense" and {"hf-lowrank", "low-rank"} <= set(card.data.tags)
    assert "`hf_lowrank.evaluate` would" in card.text, "nothing was measured"


def test_what_was_measured_goes_into_the_card_and_onto_the_page(small, dense, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    target, _ = small
    for name, model in (("before", dense), ("after", target)):
        done = command("evaluate", model, "--perplexity", dense / "text.txt", "--output", tmp_path / f"{name}.json")
        assert done.code == 0, done.err
    quality = [f"dense={tmp_path / 'before.json'}", f"factorized={tmp_path / 'after.json'}"]
    done = command("report", target, tmp_path / "page", "--dense", dense, "--quality", *quality, "--json")
    assert done.code == 0, done.err
    saved = json.loads((tmp_path / "page" / "report.json").read_text())
    assert json.loads(done.out) == saved
    assert list(saved["quality"]) == ["dense", "factorized"]
    assert all(layer["weight_error"] > 0 for layer in saved["layers"] if layer["format"] != "dense")
    assert (tmp_path / "page" / "report.html").exists()
    with Hub() as hub:
        measured = ["--evaluation", tmp_path / "after.json", "--dense", tmp_path / "before.json"]
        on_the_hub(hub, tmp_path / "home", "push", target, "me/small", *measured, "--command", "optimum-cli lowrank")
        text = hub.card("me/small").text
    assert "| text, perplexity over" in text and "`optimum-cli lowrank`" in text


def test_no_page_of_what_is_dense_or_was_not_measured(small, dense, tmp_path):
    target, _ = small
    fails(command("report", dense, tmp_path / "page"), 1, "is not factorized")
    fails(
        command("report", target, tmp_path / "page", "--quality", tmp_path / "no.json"), 1, "Cannot read an evaluation"
    )
    (tmp_path / "text.json").write_text("text")
    fails(command("report", target, tmp_path / "page", "--quality", tmp_path / "text.json"), 1, "ConfigError")
    assert not (tmp_path / "page").exists()


def test_push_refuses_what_is_not_whole(small, dense, tmp_path):
    target, _ = small
    fails(command("push", dense, "me/small"), 1, "holds no factorized checkpoint")
    fails(command("push", target, "not/a/name"), 1, "REPO is 'not/a/name'")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in target.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    fails(command("push", copy, "me/small"), 1, f"{shard.name} has another sha256 than it was written with")
    (copy / "factorization.json").unlink()
    shard.unlink()
    fails(command("push", copy, "me/small"), 1, "CheckpointError", str(copy))


def test_list_as_json():
    document = json.loads(command("list", "--json").out)
    assert list(document) == ["method", "format", "allocation", "refine", "statistic"]
    assert set(document["method"]) == set(hf_lowrank.METHODS.names())
    assert document["refine"]["blocks"].startswith("Train each factorized block")


def test_an_evaluation_that_is_none_is_refused(small, dense, tmp_path):
    target, _ = small
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert command("evaluate", target, "--perplexity", dense / "text.txt", "--output", good).code == 0
    whole = json.loads(good.read_text())
    without_size = {key: value for key, value in whole.items() if key != "size"}
    without_digest = {**whole, "data": {"text": {}}}
    for content, words in (
        ({}, ["the file lacks ['command'", "'size'"]),
        ([], ["the file is no mapping"]),
        (without_size, ["the file lacks ['size']"]),
        ({**whole, "size": 7}, ["`size` is no mapping"]),
        ({**whole, "size": {}}, ["`size` lacks ['bytes'"]),
        ({**whole, "perplexity": {"text": {"perplexity": 3.0}}}, ["'text' of `perplexity` lacks ['bos', 'nll'"]),
        ({**whole, "environment": {}}, ["`environment` lacks ['torch', 'transformers']"]),
        ({**whole, "model": {}}, ["`model` lacks ['class']"]),
        (without_digest, ["'text' of `data` lacks ['sha256']"]),
    ):
        bad.write_text(json.dumps(content))
        said = ["ConfigError", "is not what `evaluate --output` writes", *words]
        fails(command("push", target, "me/small", "--evaluation", bad), 1, f"`--evaluation` {bad}", *said)
    fails(command("push", target, "me/small", "--evaluation", good, "--dense", bad), 1, "`--dense`")
    fails(command("report", target, tmp_path / "page", "--quality", bad), 1, "`--quality`", "lacks ['sha256']")
    fails(command("push", target, "me/small", "--evaluation", tmp_path / "no.json"), 1, "Cannot read an evaluation")
