"""The closed form gives the optimum of its metric, and what it fills is an ordinary LoRA."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    CheckpointError,
    ConfigError,
    LowRankConfig,
    StatisticsError,
    TargetError,
    collect_statistics,
    factorize,
    residual_adapter,
)
from hf_lowrank.testing import tiny_model

from .conftest import CONFIGS, logits


Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    dense, inputs = tiny_model("llama")
    folder = tmp_path_factory.mktemp("residual")
    dense.save_pretrained(folder / "dense")
    statistics = collect_statistics(dense, [inputs()], method="kfac_svd")
    small = factorize(copy.deepcopy(dense), LowRankConfig(method="svd", param_ratio=0.5))
    return dense, small, statistics, inputs, folder


def parts(model, name=Q, adapter="default"):
    """`(W', BA)` of a layer, float64."""
    layer = model.get_base_model().get_submodule(name)
    left, right = layer.get_base_layer().factors()
    update = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    assert layer.scaling[adapter] == 1
    return left @ right, update.detach()


def weight(model, name=Q):
    return model.get_submodule(name).weight.detach().double()


def output_error(difference, gram):
    return ((difference @ gram) * difference).sum().sqrt().item()


def test_the_optimum_in_the_metric_of_the_inputs(made):
    dense, small, statistics, _, _ = made
    model = residual_adapter(copy.deepcopy(small), dense, rank=4, statistics=statistics)
    gram = statistics.get(Q, ["input_gram"])["input_gram"]
    applied, update = parts(model)
    lost = weight(dense) - applied
    left = output_error(lost - update, gram)
    eigenvalues = torch.linalg.eigvalsh(lost @ gram @ lost.T)
    assert left == pytest.approx(eigenvalues[:-4].sum().sqrt().item(), rel=1e-4)
    plain = parts(residual_adapter(copy.deepcopy(small), dense, rank=4))[1]
    assert left < output_error(lost - plain, gram) < output_error(lost, gram)


def test_without_statistics_it_is_the_svd_of_what_was_lost(made):
    dense, small, *_ = made
    applied, update = parts(residual_adapter(copy.deepcopy(small), dense, rank=4))
    lost = weight(dense) - applied
    basis, values, rows = torch.linalg.svd(lost)
    torch.testing.assert_close(update, basis[:, :4] * values[:4] @ rows[:4], rtol=0, atol=1e-6)


def test_the_two_sided_metric(made):
    dense, small, statistics, _, _ = made
    found = statistics.get(Q, ["input_gram", "gradient_gram"])

    def error(method):
        model = residual_adapter(copy.deepcopy(small), dense, 4, method=method, statistics=statistics)
        applied, update = parts(model)
        rest = weight(dense) - applied - update
        return (found["gradient_gram"] @ rest @ found["input_gram"] @ rest.T).trace().item()

    none = {"name": "kfac_svd", "input_shrinkage": 0.0, "grad_shrinkage": 0.0}
    assert error(none) <= error("whitened_svd") * (1 + 1e-6)
    assert error(none) < error("svd")


def test_at_full_rank_the_dense_model_comes_back(made):
    dense, small, statistics, inputs, _ = made
    model = residual_adapter(copy.deepcopy(small), dense, rank=64, statistics=statistics)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=0, atol=1e-5)
    config = model.peft_config["default"]
    # k_proj and v_proj have 32 outputs.
    assert set(config.rank_pattern.values()) == set(config.alpha_pattern.values()) == {32}


def test_quality_comes_back_with_the_rank(made):
    dense, small, statistics, inputs, _ = made
    target = logits(dense, inputs)

    def distance(model):
        return (logits(model, inputs) - target).norm().item()

    found = [
        distance(residual_adapter(copy.deepcopy(small), dense, rank, statistics=statistics)) for rank in (4, 16, 32)
    ]
    assert distance(small) > found[0] > found[1] > found[2]


@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
def test_the_files_of_the_dense_model_do_as_well(made, method):
    dense, small, statistics, inputs, folder = made
    kind = {"method": method, "statistics": statistics}
    one = residual_adapter(copy.deepcopy(small), dense, 4, **kind)
    other = residual_adapter(copy.deepcopy(small), folder / "dense", 4, **kind)
    assert torch.equal(logits(one, inputs), logits(other, inputs))


def test_files_of_transposed_layers(tmp_path):
    dense, inputs = tiny_model("gpt2")
    dense.save_pretrained(tmp_path)
    small = factorize(copy.deepcopy(dense), LowRankConfig(method="svd", param_ratio=0.5))
    model = residual_adapter(small, tmp_path, rank=64)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=0, atol=1e-5)


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
assert "hf_lowrank" not in sys.modules
print(json.dumps({name: p.shape for name, p in model.named_parameters() if "lora_" in name}))
"""


def test_stock_peft_loads_the_file(made, tmp_path):
    """In a process without the library, onto a dense model; and here, onto the factorized one."""
    dense, small, statistics, inputs, folder = made
    copy.deepcopy(small).save_pretrained(tmp_path / "small")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model = residual_adapter(base, dense, rank=64, statistics=statistics)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), tmp_path / "adapter")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder / "dense"), str(tmp_path / "adapter")],
        env={**os.environ, "HF_LOWRANK_AUTOLOAD": "0"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = json.loads(done.stdout.splitlines()[-1])
    assert {tuple(s) for name, s in shapes.items() if "k_proj.lora_A" in name} == {(32, 64)}


def test_beside_an_adapter_that_is_there_already(made):
    dense, small, statistics, inputs, _ = made
    model = get_peft_model(copy.deepcopy(small), CONFIGS["lora"]())
    same = residual_adapter(model, dense, 4, statistics=statistics, adapter_name="residual")
    assert same is model
    assert model.active_adapters == ["default", "residual"]
    alone = residual_adapter(copy.deepcopy(small), dense, 4, statistics=statistics)
    torch.testing.assert_close(logits(model, inputs), logits(alone, inputs), rtol=0, atol=1e-6)
    with torch.no_grad():
        trained = model.get_base_model().get_submodule(Q).lora_B["default"].weight.fill_(0.1)
        assert not torch.allclose(logits(model, inputs), logits(alone, inputs), atol=1e-4)
        trained.zero_()
    with pytest.raises(ConfigError, match="`adapter_name`='residual' is on the model already"):
        residual_adapter(model, dense, 4, adapter_name="residual")


def test_adapters_it_would_undo_or_overwrite(made):
    dense, small, _, _, _ = made
    model = get_peft_model(copy.deepcopy(small), CONFIGS["lora"]())
    model.merge_adapter()
    with pytest.raises(ConfigError, match="An adapter is merged.*`unmerge_adapter"):
        residual_adapter(model, dense, 4, adapter_name="residual")
    model.unmerge_adapter()
    residual_adapter(model, dense, 4, adapter_name="residual")
    injected = copy.deepcopy(small)
    injected.add_adapter(CONFIGS["lora"]())
    with pytest.raises(ConfigError, match="`adapter_name`='default' is on the model already"):
        residual_adapter(injected, dense, 4)


def test_over_quantized_weights(made):
    torchao = pytest.importorskip("torchao.quantization")
    dense, _, statistics, inputs, _ = made
    model = copy.deepcopy(dense)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2), lambda module, name: name.endswith("_proj"))
    name, gram = Q, statistics.get(Q, ["input_gram"])["input_gram"]
    lost = weight(dense) - model.get_submodule(name).weight.dequantize().double()
    adapted = residual_adapter(model, dense, rank=4, statistics=statistics)
    layer = adapted.get_base_model().get_submodule(name)
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = torch.linalg.eigvalsh(lost @ gram @ lost.T)[:-4].sum().sqrt().item()
    assert output_error(lost - update, gram) == pytest.approx(expected, rel=1e-3)
    whole = residual_adapter(adapted, dense, rank=64, adapter_name="whole", target_modules=["q_proj", "k_proj"])
    corrected = {n for n, m in whole.get_base_model().named_modules() if "whole" in getattr(m, "lora_A", ())}
    assert len(corrected) == 4


def test_quantized_factors_are_corrected_too(made):
    torchao = pytest.importorskip("torchao.quantization")
    dense, small, _, inputs, _ = made
    model = copy.deepcopy(small)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(version=2), lambda module, name: name.endswith((".left", ".right"))
    )
    adapted = residual_adapter(model, dense, rank=64)
    torch.testing.assert_close(logits(adapted, inputs), logits(dense, inputs), rtol=0, atol=1e-4)


def test_refusals(made, tmp_path):
    dense, small, statistics, _, _ = made
    for rank in (0, True, 2.0):
        with pytest.raises(ConfigError, match=f"`rank`={rank} of residual_adapter must be an integer"):
            residual_adapter(small, dense, rank)
    with pytest.raises(ConfigError, match=r"'whitened_svd' needs `statistics`: hf_lowrank.collect_statistics"):
        residual_adapter(small, dense, method="whitened_svd")
    with pytest.raises(ConfigError, match="'feature_pca' shifts biases"):
        residual_adapter(small, dense, method="feature_pca", statistics=statistics)
    with pytest.raises(ConfigError, match="`dense`='nowhere' is neither a model nor a folder"):
        residual_adapter(small, "nowhere")
    with pytest.raises(CheckpointError, match="`dense` has no weight for model.layers.0"):
        residual_adapter(small, tmp_path)
    with pytest.raises(CheckpointError, match=r"`dense` has a weight \(96, 64\) for .*down_proj"):
        wrong = copy.deepcopy(dense)
        wrong.model.layers[0].mlp.down_proj = copy.deepcopy(dense.model.layers[0].mlp.up_proj)
        residual_adapter(small, wrong)
    with pytest.raises(ConfigError, match="`dense` is offloaded at model.layers.0.*give the folder"):
        residual_adapter(small, copy.deepcopy(dense).to("meta"))
    with pytest.raises(TargetError, match="leaves nothing to correct"):
        residual_adapter(copy.deepcopy(dense), dense)
    with pytest.raises(TargetError, match=r"`target_modules`=\['no_proj'\] leaves nothing"):
        residual_adapter(small, dense, target_modules=["no_proj"])
    other = collect_statistics(tiny_model("bert")[0], [tiny_model("bert")[1]()], method="whitened_svd")
    with pytest.raises(StatisticsError, match="No statistics for model.layers"):
        residual_adapter(small, dense, statistics=other)
    assert not any("lora" in name for name, _ in small.named_parameters())
