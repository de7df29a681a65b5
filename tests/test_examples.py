"""Examples run, and README says what they do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import Hub
from processes import run_script
from transformers import LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from benchmarks import (  # noqa: E402
    adapters,
    basis_selection,
    cards,
    dictionaries,
    formats_map,
    pretraining,
    quality,
    runs,
    setups,
    table,
    training,
)


def run(*command, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.real
def test_quickstart():
    if not (setups.CACHE / "smollm2-135m-instruct").is_dir():
        pytest.skip("the model is not in the cache; `make test` fetches it")
    done = run(sys.executable, "examples/quickstart.py", "--smoke")
    assert done.returncode == 0, done.stderr
    assert "logits after reloading equal, bit for bit: True" in done.stdout
    for label in ("dense", "factorized while loading", "saved and reloaded"):
        assert label in done.stdout


def test_push_pull_and_continue(tmp_path):
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = run(sys.executable, "examples/push_and_pull.py", "me/small", "--smoke", **environment)
        assert done.returncode == 0, done.stderr
        assert "logits of the pulled model equal, bit for bit: True" in done.stdout
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repositories["me/small"])
        assert hub.commits("me/small") == 1
        assert "| Python's language reference, perplexity over 2 x 64 tokens |" in hub.card("me/small").text
        command = [sys.executable, "examples/continue_from_hub.py", "me/small", "me/tuned", "--smoke"]
        done = run(*command, "--learning-rate", "1e-2", **environment)
        assert done.returncode == 0, done.stderr
        before, after = re.search(r"held-out perplexity: ([\d.]+) -> ([\d.]+)", done.stdout).groups()
        assert float(after) < float(before)
        card, files = hub.card("me/tuned"), hub.repositories["me/tuned"]
        assert card.data.base_model == "me/small"
        assert "## Low-rank factors" in card.text
        modules = [json.loads(hub.repositories[name]["config.json"])["quantization_config"]["modules"]
                   for name in ("me/small", "me/tuned")]  # fmt: skip
        assert modules[0] == modules[1], "factors stay factors"
        assert files["model.safetensors"] != hub.repositories["me/small"]["model.safetensors"]


@pytest.mark.parametrize("name", cards.CARDS)
def test_a_committed_card_is_what_the_results_say(name):
    committed = (cards.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert cards.card(name).content == committed, "run examples/benchmarks/cards.py"


def test_every_card_is_of_some_result():
    assert {path.stem for path in cards.FOLDER.glob("*.md")} == {*cards.CARDS, "template"}


@pytest.mark.parametrize("name", cards.CARDS)
def test_the_code_in_a_card_runs(name, tmp_path):
    """In the order of the card, against a hub that has a small model under each name."""
    from hf_lowrank import LowRankConfig, factorize
    from hf_lowrank.testing import tiny_model

    text = (cards.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    model, _ = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5)).save_pretrained(tmp_path / "small")
    with Hub() as hub:
        hub.folder(cards.BASE["base_model"], tmp_path / "dense")
        hub.folder(f"me/{name}", tmp_path / "small")
        blocks = [f"{block}\nassert hf_lowrank.summary(model).rows" for block in code]
        environment = hub.environment(tmp_path / "home")
        done = run(sys.executable, "-c", "\n".join(blocks), **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.real
def test_report(tmp_path):
    if not (setups.CACHE / "all-minilm-l6-v2").is_dir():
        pytest.skip("the model is not in the cache; `make test` fetches it")
    done = run(sys.executable, "examples/report.py", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "report.json").read_text())
    assert len(saved["layers"]) == 6 * 6 + 1
    assert 0.58 < saved["budget"]["reached"] <= 0.6
    # Data-free, the recorded error is that of the weight.
    assert all(abs(layer["weight_error"] - layer["relative_error"]) < 1e-5 for layer in saved["layers"])
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_factorize_from_command_line(tmp_path):
    pytest.importorskip("optimum.commands", reason="optimum is not installed")
    folder = tmp_path / "results"
    done = run(sys.executable, "examples/factorize_from_command_line.py", "--smoke", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^\$ optimum-cli lowrank ([\w-]+)", done.stdout, re.M)
    assert commands == ["inspect", "calibrate", "factorize", "evaluate", "evaluate"]
    assert re.search(r"^dense +\d+\.\d\d\n0\.8 +\d+\.\d\d  [1-9]\d* factorized layers", done.stdout, re.M)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"dense", "kept-0.8"}


@pytest.mark.parametrize("model", ["linformer", "lama"])
def test_low_rank_attention(model):
    done = run(sys.executable, "examples/low_rank_attention.py", "--smoke", "--model", model)
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"accuracy (\d\.\d+)", done.stdout)
    assert before == after
    assert float(before) > 0.8


def test_sequence_length():
    done = run(sys.executable, "examples/benchmarks/sequence_length.py", "--smoke")
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^  (full|low rank|linformer|linformer, low rank) +16(?: +\d+\.\d\d| +-){4}$", done.stdout, re.M
    )
    assert rows == ["full", "low rank", "linformer", "linformer, low rank"] * 2


def test_commands_in_the_readmes_name_files_that_exist():
    documents = ("README.md", "CONTRIBUTING.md", "examples/README.md", *sorted((ROOT / "docs").glob("*.md")))
    for readme in documents:
        text = (ROOT / readme).read_text(encoding="utf-8")
        for path in re.findall(r"(?:examples|tests)/[\w/]+\.py", text):
            assert (ROOT / path).exists(), f"{readme} names {path}"
        for target in re.findall(r"make (quickstart|test|check|style)", text):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_every_script_has_a_row():
    rows = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").rglob("*.py")):
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            assert f"| `{path.relative_to(ROOT / 'examples').as_posix()}` |" in rows


def test_the_method_table_is_complete():
    import hf_lowrank

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in hf_lowrank.METHODS.names():
        assert f"| `{name}` |" in text


def result(variant, size, windows=2, perplexity=12.345):
    text = {"windows": windows, "window": 2048, "bos": False, "perplexity": perplexity}
    task = {"items": 8, "metric": "acc_norm", "acc_norm": 0.5, "acc_norm_stderr": 0.19}
    evaluation = {
        "perplexity": {"wikitext2": text, "other": {**text, "perplexity": 2e6}}, "multiple_choice": {"piqa": task},
        "mean_accuracy": 0.5, "size": {"bytes": size << 20, "linear_bytes": size << 19}, "data": {},
    }  # fmt: skip
    seconds = {"load": 100, "calibration": 3.2, "factorize": 1.3}
    return {"variant": variant, "base": "a model", "seconds": seconds, "evaluation": evaluation}


def test_the_table_of_results(tmp_path):
    for name, size, perplexity in (("small", 10, 24.69), ("dense", 20, 12.345)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, size, perplexity=perplexity)))
    lines = table.render(table.read(tmp_path)).splitlines()
    assert "quality.py --window 2048 --windows 2 --limit 8`" in lines[0]
    assert "2 x 2048 tokens" in lines[0]
    assert "8 items a task (piqa acc_norm; one standard error up to 0.190)" in lines[0]
    assert lines[-2:] == [
        "| `dense` | 20.0 | 10.0 | 12.35 | 2.0e+06 | 0.500 | 0.500 | 4 |",
        "| `small` | 10.0 | 5.0 | 24.69 (2.000x) | 2.0e+06 | 0.500 | 0.500 | 4 |",
    ]
    (tmp_path / "small.json").write_text(json.dumps(result("small", 10, windows=3)))
    with pytest.raises(SystemExit, match="small and dense were measured on different .* --again --variants NAME"):
        table.read(tmp_path)


def test_the_table_in_the_readme_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.into_readme(readme, table.render(table.read())) == readme, "run examples/benchmarks/table.py --readme"


def test_every_row_is_made_again_by_its_name():
    """What `make results` would make is what there is, by the same options and the same protocol."""
    found = {result["variant"]: result for result in table.read()}
    assert set(found) == set(quality.VARIANTS)
    for name, result in found.items():
        assert quality.parse(name) == result["config"]
        evaluation = result["evaluation"]
        assert {(text["window"], text["windows"]) for text in evaluation["perplexity"].values()} == {(1024, 8)}
        assert {task["items"] for task in evaluation["multiple_choice"].values()} == {100}


def test_the_table_of_adapters_in_the_readme_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    again = table.into_readme(readme, adapters.table(), "adapters")
    assert again == readme, "run examples/benchmarks/adapters.py --readme"


def test_the_table_of_pretraining_in_the_docs_is_that_of_the_results():
    written = pretraining.DOCS.read_text(encoding="utf-8")
    again = table.into_readme(written, pretraining.table(), "pretraining")
    assert again == written, "run examples/benchmarks/pretraining.py --docs"


def test_a_difference_that_the_seeds_do_not_show_is_called_that(tmp_path):
    def runs(*scores):
        return {str(seed): {"score": score, "parameters": 7} for seed, score in enumerate(scores)}

    found = {"task": "sst2", "ratio": 0.6, "metric": "accuracy"}
    found["runs"] = {"lora": runs(0.80, 0.82, 0.81), "better": runs(0.90, 0.92, 0.912), "same": runs(0.81, 0.82, 0.80)}
    (tmp_path / "sst2-0.6.json").write_text(json.dumps(found))
    lines = {line.split(" | ")[2]: line for line in adapters.table(tmp_path).splitlines()[2:]}
    assert "no difference shown" in lines["same"]
    assert "no difference" not in lines["better"]
    assert "+0.101 ± 0.0029" in lines["better"]
    assert lines["lora"].endswith("| 3 | 7 | 0.81 | 0.01 |  |")


def test_what_is_not_trained_stands_above_what_is(tmp_path):
    found = {"task": "wikipedia", "ratio": 0.6, "metric": "perplexity", "before": {"dense": 20.5, "factorized": 61.25}}
    found["runs"] = {"lora": {"0": {"score": 40.0, "parameters": 7}}}
    (tmp_path / "wikipedia-0.6.json").write_text(json.dumps(found))
    lines = adapters.table(tmp_path).splitlines()[2:]
    assert lines[0] == "| wikipedia (perplexity) | 1 | dense, not trained |  |  | 20.5 |  |  |"
    assert lines[1] == "| wikipedia (perplexity) | 0.6 | factorized, not trained |  |  | 61.25 |  |  |"
    assert lines[2].startswith("| wikipedia (perplexity) | 0.6 | lora | 1 | 7 | 40 |")


def test_variants_share_statistics_and_are_stored_in_bfloat16(tmp_path):
    from hf_lowrank.testing import tiny_model

    tiny_model("llama")[0].save_pretrained(tmp_path)
    maker = quality.Maker(tmp_path, None, tmp_path)
    made = {name: maker.make(name, quality.parse(name)) for name in ("kfac_svd-0.8-self", "kfac_svd-0.5", "dense")}
    wide, narrow, dense = (size for _, size, _ in made.values())
    assert narrow.linear_parameters <= dense.linear_parameters * 0.5 < wide.linear_parameters
    orders = [b for b in made["kfac_svd-0.8-self"][0].buffers() if b.dtype == torch.int32]
    assert wide.bytes == 2 * wide.parameters + 2 * sum(order.numel() for order in orders)
    seconds = [record["seconds"] for _, _, record in made.values()]
    assert seconds[0]["calibration"] == seconds[1]["calibration"]
    recipe = made["kfac_svd-0.5"][0].config.quantization_config.recipe
    assert recipe["calibration"]["data"] == "self"


def test_pretraining(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    (tmp_path / "tinyshakespeare").mkdir()
    text = "\n".join(f"line {i}: what is past is prologue" for i in range(300))
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text)
    command = [sys.executable, "examples/benchmarks/pretraining.py", "--data", str(tmp_path), "--seeds", "1"]
    command += [
        "--texts",
        "tinyshakespeare",
        "--steps",
        "2",
        "--output",
        str(tmp_path),
        "--cache",
        str(tmp_path / "c"),
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    runs = {
        name: found["0"] for name, found in json.loads((tmp_path / "tinyshakespeare.json").read_text())["runs"].items()
    }
    sizes = {name: (found["parameters"], found["bytes"]) for name, found in runs.items()}
    assert len(runs) == 6
    assert sizes["low rank"] < sizes["low rank, equal parameters"] < sizes["low rank, equal bytes"] < sizes["full"]
    for name, which in (("low rank, equal parameters", 0), ("low rank, equal bytes", 1)):
        # Met from below, to within a rank of every weight.
        assert 0.9 * sizes["sltrain"][which] < sizes[name][which] <= sizes["sltrain"][which]
    assert sizes["sltrain"] == sizes["sltrain, magnitude"]
    assert runs["sltrain"]["training_bytes"] < runs["full"]["training_bytes"]
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert " s\n" not in again.stdout, "nothing is measured twice"
    assert "| tinyshakespeare | sltrain, magnitude | 1 |" in again.stdout


def test_variants_after_a_plus_sign_are_quantized_or_corrected(tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from hf_lowrank.testing import tiny_model

    monkeypatch.setattr(quality, "GROUP", 32)
    dense, inputs = tiny_model("llama")
    dense.save_pretrained(tmp_path)
    maker = quality.Maker(tmp_path, None, tmp_path)
    names = ("svd-0.5", "svd-0.5+int8", "svd-0.9+int4", "int4", "int4+residual")
    made = {name: maker.make(name, quality.parse(name)) for name in names}
    sizes = {name: size for name, (_, size, _) in made.items()}
    assert sizes["svd-0.5+int8"].linear_parameters == sizes["svd-0.5"].linear_parameters
    assert sizes["svd-0.5+int8"].linear_bytes < 0.65 * sizes["svd-0.5"].linear_bytes
    # Half a byte a number, and a scale and a zero of two bytes for 32 of them; matrices too small for a rank of 32
    # have a left factor that cannot be divided so.
    matrices = [p for name, p in made["svd-0.9+int4"][0].named_parameters() if "layers" in name and p.ndim == 2]
    expected = sum(p.numel() * (1 / 2 + 4 / 32 if p.shape[1] % 32 == 0 else 2) for p in matrices)
    assert sizes["svd-0.9+int4"].linear_bytes == expected < sizes["int4"].linear_bytes
    corrected = made["int4+residual"][0]
    lora = [p for name, p in corrected.named_parameters() if "lora_" in name]
    added = sum(p.numel() for p in lora)
    assert {p.dtype for p in lora} == {torch.bfloat16}
    assert sizes["int4+residual"].bytes == sizes["int4"].bytes + 2 * added
    assert added == 16 * sum(sum(m.weight.shape) for name, m in dense.named_modules() if name.endswith("_proj"))

    def lost(model):
        return (model(**inputs()).logits.float() - dense(**inputs()).logits).norm().item()

    assert lost(corrected) < 0.8 * lost(made["int4"][0])
    assert {"quantization", "residual"} <= set(made["int4+residual"][2])


def test_export_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'hf-lowrank[export]'")
    done = run(sys.executable, "examples/export_onnx.py", "--smoke")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(dense|factors|factors in int8) +([\d.]+) +[\d.]+ +(\S+)$", done.stdout, re.M)
    assert [name for name, _, _ in rows] == ["dense", "factors", "factors in int8"]
    assert float(rows[1][2]) < 1e-5


def test_adapter_speed():
    pytest.importorskip("peft", reason="peft is not installed")
    done = run(sys.executable, "examples/benchmarks/adapter_speed.py", "--tiny")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w[\w, ]*?) {2,}(\d\.\d{3})", done.stdout, re.M))
    variants = ("wara", "wara, two levels", "wara, db4", "wara, db4, two levels", "wara, db4, shared")
    assert rows == dict.fromkeys(("lora", *variants), "1.000"), "equal parameters"


def test_training_speed():
    done = run(sys.executable, "examples/benchmarks/training_speed.py", "--tiny")
    assert done.returncode == 0, done.stderr
    for line in (r"left rests +\d", r"turns +\d", r"by latency +step \d", r"pairs +7\n"):
        assert re.search(line, done.stdout), line


def test_basis_selection_is_compared_at_its_size_and_goes_on(tmp_path, capsys):
    path = tmp_path / "results.json"
    task = basis_selection.Tiny()
    basis_selection.measure(task, path, 0.5, ["basis_selection"], 1, 6)
    first = json.loads(path.read_text())
    basis_selection.measure(task, path, 0.5, basis_selection.VARIANTS, 1, 6)
    found = json.loads(path.read_text())
    assert found["runs"]["basis_selection"] == first["runs"]["basis_selection"]
    kept = {variant: runs["0"]["kept"] for variant, runs in found["runs"].items()}
    assert kept["dense"] == 1
    assert kept["basis_selection"] < 0.6
    # Ranks of these small weights are coarse.
    assert kept["basis_selection"] - 0.05 < kept["svd_llm"] <= kept["basis_selection"]
    assert all(0 < runs["0"]["score"] < 2 * found["before"] for runs in found["runs"].values())
    capsys.readouterr()
    basis_selection.measure(task, path, 0.5, basis_selection.VARIANTS, 1, 6)
    assert "perplexity" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was measured otherwise"):
        basis_selection.measure(task, path, 0.5, basis_selection.VARIANTS, 1, 7)


def test_the_map_of_formats(tmp_path, capsys):
    path, task = tmp_path / "results.json", formats_map.Tiny(tmp_path / "model")
    chosen = formats_map.variants()
    assert {"svd", "hybrid", "compot", "whitened_svd, pivoted"} < set(chosen)
    assert not {"random", "sltrain"} & set(chosen)
    formats_map.measure_matrices(task, path, [0.8], ["svd"])
    first = json.loads(path.read_text())["runs"]["smoke"]["svd"]
    formats_map.measure_matrices(task, path, [0.8], chosen)
    found = formats_map.measure_models(task, path, 0.8, ["svd", "whitened_svd"])
    measured = found["runs"]["smoke"]
    assert measured["svd"] == first
    assert set(measured) == {*chosen, *formats_map.BITS}
    for variant in chosen:
        cells = [cell for label, cell in measured[variant]["0.8"].items() if "." in label]
        assert len(cells) == 4
        assert all(0.7 < cell["bytes"] / cell["dense_bytes"] < 0.86 for cell in cells), variant
        assert all(0 < cell["error"] < 1 for cell in cells), variant
    for label in ("attention.0", "attention.1", "mlp.0", "mlp.1"):
        errors = {variant: measured[variant]["0.8"][label]["error"] for variant in ("svd", "whitened_svd", "compot")}
        assert errors["compot"] < errors["whitened_svd"] < errors["svd"]
    assert set(found["models"]) == {"dense", "svd", "whitened_svd"}
    assert found["models"]["dense"]["kept"] == 1
    assert 0.6 < found["models"]["whitened_svd"]["kept"] <= 0.8
    capsys.readouterr()
    formats_map.show(found)
    assert "compot" in re.search("attention: not dominated are (.*)", capsys.readouterr().out)[1]
    formats_map.draw(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_map_in_the_docs_is_that_of_the_results():
    written = formats_map.DOCS.read_text(encoding="utf-8")
    found = json.loads(formats_map.RESULTS.read_text(encoding="utf-8"))
    again = table.into_readme(written, formats_map.table(found), "map")
    assert again == written, "run examples/benchmarks/formats_map.py --docs"


def test_what_no_other_variant_beats():
    def run(error, size):
        cell = {"error": error, "bytes": size, "dense_bytes": 100}
        return {"attention.0": cell, "mlp.0": cell}

    measured = {
        "best where large": {"0.8": run(0.1, 80), "0.6": run(0.4, 60)},
        "best where small": {"0.8": run(0.2, 80), "0.6": run(0.3, 60)},
        "beaten": {"0.8": run(0.25, 80), "0.6": run(0.35, 60)},
        # Smaller than all others at its second point, and beaten at the first.
        "beaten, smaller": {"0.8": run(0.5, 77), "0.6": run(0.6, 58)},
        "refused": {"0.8": {"refused": "no"}},
    }
    assert formats_map.front(measured, "attention") == ["best where large", "best where small"]


def test_dictionaries_are_compared_at_equal_numbers_and_go_on(tmp_path, capsys):
    path, ratio, variants = tmp_path / "results.json", "0.8", dictionaries.VARIANTS
    task = dictionaries.Tiny(tmp_path / "model")
    dictionaries.measure_matrices(task, path, [ratio], ["svd"], 2, "mask")
    first = json.loads(path.read_text())["runs"]
    dictionaries.measure_matrices(task, path, [ratio], variants, 2, "mask")
    found = dictionaries.measure_model(task, path, 0.8)
    assert len(found["runs"]) == 6
    for name, ratios in found["runs"].items():
        cells = ratios[ratio]
        assert cells["svd"] == first[name][ratio]["svd"]
        numbers = cells["svd"]["shape"][0] * cells["svd"]["shape"][1]
        assert all(0.9 * 0.8 < cell["bytes"] / 2 / numbers <= 0.8 for cell in cells.values())
        assert cells["compot"]["error"] < cells["whitened_svd"]["error"] < cells["svd"]["error"]
        assert all(abs(cell["stored"] - cell["error"]) < 1e-2 for cell in cells.values())
    assert all(made["kept"] <= 0.82 for name, made in found["models"].items() if name != "dense")
    capsys.readouterr()
    dictionaries.measure_matrices(task, path, [ratio], variants, 2, "mask")
    dictionaries.measure_model(task, path, 0.8)
    assert capsys.readouterr().out == ""
    dictionaries.show(found, variants)
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was measured otherwise"):
        dictionaries.measure_matrices(task, path, [ratio], variants, 3, "mask")


@pytest.mark.real
def test_quality(tmp_path):
    data = Path(os.environ.get("HF_LOWRANK_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir() or not (setups.CACHE / "smollm2-135m-instruct").is_dir():
        pytest.skip("no data (HF_LOWRANK_DATA) or no model in the cache; `make test` fetches the model")
    pytest.importorskip("torchao", reason="torchao is not installed")
    command = [sys.executable, "examples/benchmarks/quality.py", "--data", str(data), "--output", str(tmp_path)]
    sizes = ["--window", "256", "--windows", "2", "--limit", "2", "--variants"]
    sizes += ["dense", "int8", "int4", "svd-0.9", "svd-0.9+int8"]
    done = run(*command, *sizes)
    assert done.returncode == 0, done.stderr
    results = {entry["variant"]: entry["evaluation"] for entry in table.read(tmp_path)}
    assert list(results) == ["dense", "svd-0.9", "int8", "svd-0.9+int8", "int4"], "largest first"
    dense, int8, int4 = (results[name]["perplexity"]["wikitext2"]["perplexity"] for name in ("dense", "int8", "int4"))
    assert abs(int8 / dense - 1) < 0.05
    assert dense < int4 < 2 * dense
    linears = results["dense"]["size"]["linear_parameters"]
    assert results["int4"]["size"]["linear_bytes"] == linears / 2 + linears / 64 * 4
    assert "there already" in run(*command, *sizes).stdout


@pytest.mark.parametrize("recovery", ["mixed", "plain"])
def test_lpaf(recovery):
    pytest.importorskip("peft", reason="peft is not installed")
    done = run(sys.executable, "examples/lpaf.py", "--smoke", "--recovery", recovery)
    assert done.returncode == 0, done.stderr
    assert "12 matrices: rank" in done.stdout
    assert "the same: True" in done.stdout
    pruned, factorized, again = (float(found) for found in re.findall(r"accuracy (\d\.\d+)", done.stdout))
    assert min(pruned, factorized) > 0.9, "half of the sentences are of either class"
    assert again == factorized


def test_classify():
    done = run(sys.executable, "examples/classify.py", "--smoke")
    assert done.returncode == 0, done.stderr
    tuned, factorized, trained, again = (float(found) for found in re.findall(r"accuracy (\d\.\d+)", done.stdout))
    assert tuned > 0.9 and trained == again > 0.9
    assert factorized <= tuned
    assert "the same: True" in done.stdout


def test_vision():
    if not (quality.DATA / "digits8x8").is_dir():
        pytest.importorskip("sklearn", reason="the digits are in no folder, and scikit-learn is not installed")
    done = run(sys.executable, "examples/vision.py", "--smoke")
    assert done.returncode == 0, done.stderr
    accuracy = {name: float(found) for name, found in re.findall(r"^(\w+): accuracy (\d\.\d+)", done.stdout, re.M)}
    assert accuracy["dense"] > 0.5, "one digit in ten is right by chance"
    assert accuracy["svd"] <= accuracy["kfac_svd"]
    assert "loaded again, the same: True" in done.stdout


def test_finetune_wara(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    done = run(sys.executable, "examples/finetune_wara.py", "--smoke", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"held-out perplexity: ([\d.]+) -> ([\d.]+)", done.stdout).groups()
    assert float(after) < float(before)
    kinds = dict(re.findall(r"^(adapter|lora|merged): .*differ by at most (\S+)", done.stdout, re.M))
    assert set(kinds) == {"adapter", "lora", "merged"}
    assert all(float(difference) < 1e-4 for difference in kinds.values())
    assert "lora: LORA" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter", "lora", "merged"}


def test_distributed_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "examples")]))
    script, options = ROOT / "examples/distributed_calibration.py", ["--smoke", "--samples", "5", "--length", "16"]
    done = run_script(script, tmp_path, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "80 tokens in 2 processes" in done.stdout
    assert (tmp_path / "factorized" / "model.safetensors").exists()


def test_pruning_ranks():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run(sys.executable, "examples/benchmarks/pruning_ranks.py", "--smoke", "--seeds", "1", "--steps", "10")
    assert done.returncode == 0, done.stderr
    ranks = {kind: float(rank) for kind, rank in re.findall(r"^(\w+ \S+) seed 0: rank ([\d.]+)", done.stdout, re.M)}
    assert len(ranks) == 7
    assert ranks["magnitude 0.1"] == ranks["none 1"] == 1
    assert ranks["taylor 0.1"] < ranks["movement 0.1"] < 0.95
    assert int(re.search(r"drawn: (\d+) bytes", done.stdout)[1]) > 10_000


def test_a_function_is_met_by_two_resolutions(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run(sys.executable, "examples/benchmarks/function_tensor.py", "--smoke", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "function_tensor.json").read_text())["runs"]
    percent = {key: measured["percent"] for key, measured in found.items()}
    assert percent["one resolution, [[x], [y, z]], 2, 0"] < 1e-6, "the function is of rank 2 there"
    assert percent["two resolutions, 1 + R, 5, 0"] < percent["outer products (PARAFAC), 5, 0"]
    assert (tmp_path / "function_tensor.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_told_of_the_function_is_in_its_results():
    found = json.loads((ROOT / "examples" / "benchmarks" / "results" / "function_tensor.json").read_text())["runs"]

    def mean(name, rank):
        return sum(found[f"{name}, {rank}, {seed}"]["percent"] for seed in (0, 1, 2)) / 3

    # 16 400 numbers against 15 300 and 18 300.
    ours, alone = mean("two resolutions, 1 + R", 21), [mean("outer products (PARAFAC)", rank) for rank in (51, 61)]
    assert ours < 0.6
    assert 1.7 < alone[1] < alone[0] < 2.4
    assert mean("two resolutions, 1 + R", 1) > mean("outer products (PARAFAC)", 31), "below 13 thousand"
    assert mean("fine to coarse, R + 1", 21) > alone[0]


def test_design_space():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run(sys.executable, "examples/benchmarks/design_space.py", "--smoke", "--ranks", "1", "8")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^rank (?:1|8), blocks \[\d\]: perplexity", done.stdout, re.M)) == 4
    assert len(re.findall(r"early blocks are worse: (?:confirmed|refuted)$", done.stdout, re.M)) == 2
    assert int(re.search(r"drawn: (\d+) bytes", done.stdout)[1]) > 10_000


def test_training_methods_end_at_one_size():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    sizes = ["--seeds", "1", "--steps", "8", "--ratios", "0.25"]
    done = run(sys.executable, "examples/benchmarks/training.py", "--smoke", *sizes)
    assert done.returncode == 0, done.stderr
    rows = {cells[2]: cells for line in done.stdout.splitlines() if len(cells := line.split(" | ")) == 8}
    assert {"dense", "svd", "fwsvd", "lpaf", "trp", "maestro"} <= set(rows)
    # Rank 8 of 64 x 64, 9 of 96 x 64, twice: floor(0.25 mn / (m + n)).
    assert {rows[name][4] for name in ("svd", "fwsvd", "lpaf", "trp")} == {str(2 * (4 * 8 * 128 + 2 * 9 * 160))}
    assert 0 < int(rows["maestro"][4]) <= 0.25 * 2 * (4 * 64 * 64 + 2 * 96 * 64)


def test_recovery_of_a_language_model_is_its_perplexity_on_eight_windows():
    from hf_lowrank import evaluation

    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    held_out = SimpleNamespace(validation=torch.randint(96, (9 * 512,), generator=torch.Generator().manual_seed(0)))
    found = adapters.Language.score(held_out, model)
    assert found == evaluation.perplexity(model, held_out.validation[: 8 * 512], 512).perplexity


def test_results_are_filled_run_by_run(tmp_path):
    path = tmp_path / "new" / "sst2-0.5.json"
    found = runs.opened(path, {"task": "sst2", "steps": 8}, metric="accuracy")
    found["runs"]["svd"] = {"0": {"score": 0.5, "parameters": 7}}
    runs.write(path, found)
    assert runs.opened(path, {"task": "sst2", "steps": 8}) == found
    assert [each.name for each in path.parent.iterdir()] == ["sst2-0.5.json"]
    with pytest.raises(SystemExit, match=r"measured otherwise \({'steps': 8}\); remove it"):
        runs.opened(path, {"task": "sst2", "steps": 9})


def test_the_table_and_the_figure_of_training(tmp_path):
    def results(*scores):
        return {str(seed): {"score": score, "parameters": 7} for seed, score in enumerate(scores)}

    for ratio in (0.25, 0.5):
        found = {"task": "sst2", "ratio": ratio, "metric": "accuracy", "runs": {"dense": {"0": {"score": 0.9}}}}
        found["runs"] |= {"fwsvd": results(0.80, 0.82, 0.81), "lpaf": results(0.90, 0.92, 0.912)}
        (tmp_path / f"sst2-{ratio:g}.json").write_text(json.dumps(found))
    lines = training.table(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["1", "dense"], ["0.5", "fwsvd"], ["0.5", "lpaf"], ["0.25", "fwsvd"], ["0.25", "lpaf"]
    ]  # fmt: skip
    assert "+0.101 ± 0.0029" in lines[2]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    training.draw(tmp_path, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
