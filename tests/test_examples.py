"""Examples run, and README says what they do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from benchmarks import adapters, quality, setups, table  # noqa: E402


def run(*command):
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": path}
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


def test_factorize_from_command_line(tmp_path):
    pytest.importorskip("optimum.commands", reason="optimum is not installed")
    folder = tmp_path / "results"
    done = run(sys.executable, "examples/factorize_from_command_line.py", "--smoke", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^\$ optimum-cli lowrank ([\w-]+)", done.stdout, re.M)
    assert commands == ["inspect", "calibrate", "factorize", "evaluate", "evaluate"]
    assert re.search(r"^dense +\d+\.\d\d\n0\.8 +\d+\.\d\d  [1-9]\d* factorized layers", done.stdout, re.M)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"dense", "kept-0.8"}


def test_commands_in_the_readmes_name_files_that_exist():
    for readme in ("README.md", "CONTRIBUTING.md", "examples/README.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for path in re.findall(r"(?:examples|tests)/[\w/]+\.py", text):
            assert (ROOT / path).exists(), f"{readme} names {path}"
        for target in re.findall(r"make (quickstart|test|check|style)", text):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_the_method_table_is_complete():
    import hf_lowrank

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in hf_lowrank.METHODS.names():
        assert f"| `{name}` |" in text


def result(variant, size, windows=2):
    text = {"windows": windows, "window": 2048, "bos": False, "perplexity": 12.345}
    task = {"items": 8, "metric": "acc_norm", "acc_norm": 0.5, "acc_norm_stderr": 0.19}
    evaluation = {
        "perplexity": {"wikitext2": text, "other": {**text, "perplexity": 2e6}}, "multiple_choice": {"piqa": task},
        "mean_accuracy": 0.5, "size": {"bytes": size << 20, "linear_bytes": size << 19}, "data": {},
    }  # fmt: skip
    return {"variant": variant, "base": "a model", "evaluation": evaluation}


def test_the_table_of_results(tmp_path):
    for name, size in (("small", 10), ("dense", 20)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, size)))
    lines = table.render(table.read(tmp_path)).splitlines()
    assert "2 x 2048 tokens" in lines[0]
    assert "8 items a task (piqa acc_norm; one standard error up to 0.190)" in lines[0]
    assert lines[-2:] == [
        "| `dense` | 20.0 | 10.0 | 12.35 | 2.0e+06 | 0.500 | 0.500 |",
        "| `small` | 10.0 | 5.0 | 12.35 | 2.0e+06 | 0.500 | 0.500 |",
    ]
    (tmp_path / "small.json").write_text(json.dumps(result("small", 10, windows=3)))
    with pytest.raises(SystemExit, match="small and dense were measured on different .* --again --variants NAME"):
        table.read(tmp_path)


def test_the_table_in_the_readme_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.into_readme(readme, table.render(table.read())) == readme, "run examples/benchmarks/table.py --readme"


def test_the_table_of_adapters_in_the_readme_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    again = table.into_readme(readme, adapters.table(), "adapters")
    assert again == readme, "run examples/benchmarks/adapters.py --readme"


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


def test_adapter_speed():
    pytest.importorskip("peft", reason="peft is not installed")
    done = run(sys.executable, "examples/benchmarks/adapter_speed.py", "--tiny")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w[\w, ]*?) {2,}(\d\.\d{3})", done.stdout, re.M))
    assert rows == dict.fromkeys(("lora", "wara", "wara, db4", "wara, db4, shared"), "1.000"), "equal parameters"


@pytest.mark.real
def test_quality(tmp_path):
    data = Path(os.environ.get("HF_LOWRANK_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir() or not (setups.CACHE / "smollm2-135m-instruct").is_dir():
        pytest.skip("no data (HF_LOWRANK_DATA) or no model in the cache; `make test` fetches the model")
    pytest.importorskip("torchao", reason="torchao is not installed")
    command = [sys.executable, "examples/benchmarks/quality.py", "--data", str(data), "--output", str(tmp_path)]
    sizes = ["--window", "256", "--windows", "2", "--limit", "2", "--variants", "dense", "int8", "int4", "svd-0.9"]
    done = run(*command, *sizes)
    assert done.returncode == 0, done.stderr
    results = {entry["variant"]: entry["evaluation"] for entry in table.read(tmp_path)}
    assert list(results) == ["dense", "svd-0.9", "int8", "int4"], "largest first"
    dense, int8, int4 = (results[name]["perplexity"]["wikitext2"]["perplexity"] for name in ("dense", "int8", "int4"))
    assert abs(int8 / dense - 1) < 0.05
    assert dense < int4 < 2 * dense
    linears = results["dense"]["size"]["linear_parameters"]
    assert results["int4"]["size"]["linear_bytes"] == linears / 2 + linears / 64 * 4
    assert "there already" in run(*command, *sizes).stdout
