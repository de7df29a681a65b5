"""Models out of a GGUF file: refused while loading, with the way that works, and that way works."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lowrank import ConfigError, LowRankConfig, factorize
from hf_lowrank.testing import tiny_model


def test_refused_with_the_cure(tmp_path):
    tiny_model("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"load it without `lowrank_config`, then call hf_lowrank\.factorize"):
        LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", lowrank_config=LowRankConfig(method="svd"))


@pytest.mark.real
def test_a_model_from_gguf_factorizes_saves_and_reloads(smollm2, tmp_path, monkeypatch):
    # The cached model was loaded from GGUF and saved; here the marks a GGUF load leaves are put back on it.
    from transformers import GgufConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    model.config.quantization_config = GgufConfig()
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=False)
    factorize(model, LowRankConfig(method="svd", param_ratio=0.9))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
