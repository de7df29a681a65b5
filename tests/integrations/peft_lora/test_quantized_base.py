"""A quantized model and the calibrated residual of it, as files that need nothing but transformers and PEFT."""

import json

import pytest
import torch
from processes import run
from transformers import AutoModelForCausalLM

from hf_lowrank import collect_statistics, residual_adapter
from hf_lowrank.testing import tiny_model

from .conftest import logits


torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # noqa: E402
from transformers import TorchAoConfig  # noqa: E402


KINDS = {
    "int8": torchao.Int8WeightOnlyConfig(version=2),
    "int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),
    "int2": torchao.IntxWeightOnlyConfig(torch.int2, torchao.PerGroup(32)),
}
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
saved = torch.load({saved!r})
apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
together = AutoModelForCausalLM.from_pretrained({together!r})
for model in (apart, together):
    assert torch.equal(model(**saved["inputs"]).logits, saved["logits"])
assert "hf_lowrank" not in sys.modules
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model, inputs = tiny_model("llama")
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return model, collect_statistics(model, [inputs()], method="whitened_svd"), inputs, folder


def distance(model, dense, inputs):
    return (logits(model, inputs) - logits(dense, inputs)).norm().item()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_and_peft_load_it(dense, kind, tmp_path):
    dense, statistics, inputs, folder = dense
    base, together = tmp_path / "base", tmp_path / "together"
    for target in (base, together):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(KINDS[kind])).save_pretrained(
            target
        )
    quantized = AutoModelForCausalLM.from_pretrained(together)
    lost = distance(quantized, dense, inputs)
    model = residual_adapter(quantized, dense, rank=16, statistics=statistics)
    assert distance(model, dense, inputs) < 0.8 * lost
    # In a folder of its own, and beside the weights it belongs to.
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(together)
    assert json.loads((together / "adapter_config.json").read_text())["base_model_name_or_path"] == str(together)
    torch.save({"inputs": inputs(), "logits": logits(model, inputs)}, tmp_path / "saved.pt")
    code = STOCK.format(
        saved=str(tmp_path / "saved.pt"), base=str(base), adapter=str(tmp_path / "adapter"), together=str(together)
    )
    done = run(code, HF_LOWRANK_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]


def test_calibration_counts(dense):
    """The metric of the inputs leaves a smaller error of the outputs than the plain one, at the same rank."""
    dense, statistics, inputs, folder = dense

    def residual(**kind):
        config = TorchAoConfig(KINDS["int2"])
        quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        return distance(residual_adapter(quantized, dense, rank=8, **kind), dense, inputs)

    assert residual(statistics=statistics) < residual()


def test_weights_that_cannot_be_unpacked(dense):
    """torchao's packed 4-bit weights for CPUs have no `dequantize`; what they make of the identity is corrected."""
    dense, statistics, inputs, folder = dense
    config = TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    lost = distance(quantized, dense, inputs)
    assert distance(residual_adapter(quantized, dense, rank=16, statistics=statistics), dense, inputs) < 0.8 * lost
