"""Biases beside an adapter are trained, saved and loaded as those of the dense model are, and under their names."""

import peft
import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_lowrank import LowRankConfig, MixedRankConfig, WaraConfig, factorize
from hf_lowrank.testing import tiny_model
from hf_lowrank.tuners import save_as_lora

from .conftest import logits


TARGETS = ["q_proj", "k_proj"]
METHODS = {
    "lora": LoraConfig,
    "oft": lambda **options: OFTConfig(oft_block_size=16, **options),
    "wara": WaraConfig,
    "mixed_rank": lambda **options: MixedRankConfig(r=4, **options),
}


def base(format):
    """A model whose queries, keys and values have a bias, and its inputs."""
    model, inputs = tiny_model("qwen2")
    if format is not None:
        factorize(model, LowRankConfig(method="svd", format=format, param_ratio=0.5, rank_multiple=1))
    return model, inputs


def biased(model, method, bias, scale=0.3):
    """`model` with an adapter, and everything it trains moved."""
    bias = bias if bias in ("all", "none") else f"{method}_only"
    model = get_peft_model(model, METHODS[method](bias=bias, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def names(folder):
    return {key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("bias")}


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("format", ["low_rank", "pivoted"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_loaded(method, format, bias, tmp_path):
    model, inputs = base(format)
    model = biased(model, method, bias)
    model.save_pretrained(tmp_path / "factorized")
    assert len(names(tmp_path / "factorized")) == (6 if bias == "all" else 4)
    biased(base(None)[0], method, bias).save_pretrained(tmp_path / "dense")
    assert names(tmp_path / "factorized") == names(tmp_path / "dense")
    expected = logits(model, inputs)
    again = PeftModel.from_pretrained(base(format)[0], tmp_path / "factorized")
    assert torch.equal(logits(again, inputs), expected)
    through_transformers = base(format)[0]
    through_transformers.load_adapter(tmp_path / "factorized")
    assert torch.equal(logits(through_transformers.eval(), inputs), expected)
    # What was loaded is saved again.
    again.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "factorized")


@pytest.mark.parametrize("method", ["lora", "wara"])
def test_an_adapter_of_the_dense_model_brings_its_biases(method, tmp_path):
    dense = biased(base(None)[0], method, "all")
    dense.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base("low_rank")[0], tmp_path)
    layer = "base_model.model.model.layers.0.self_attn"
    for name in ("q_proj.base_layer", "v_proj"):
        assert torch.equal(model.get_submodule(f"{layer}.{name}").bias, dense.get_submodule(f"{layer}.{name}").bias)


def test_injected_without_a_peft_model(tmp_path):
    model, inputs = base("low_rank")
    model = biased(model, "lora", "only")
    model.save_pretrained(tmp_path)
    again = base("low_rank")[0]
    config = LoraConfig.from_pretrained(str(tmp_path))
    peft.inject_adapter_in_model(config, again)
    found = peft.set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))


def test_written_as_lora_they_are_loras(tmp_path):
    model, inputs = base("low_rank")
    model = biased(model, "wara", "only")
    save_as_lora(tmp_path / "lora", model)
    again = PeftModel.from_pretrained(base("low_rank")[0], tmp_path / "lora")
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "lora") != set()
