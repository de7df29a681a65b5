"""Llama's linear layers as vLLM fuses them, filled from a folder, for all ranks of a tensor-parallel group; and a
transformers model whose own linears are replaced by them, so that its logits can be compared."""

import json

import torch
import vllm_stand_in as vllm
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Attention(nn.Module):
    def __init__(self, config, quant, prefix, qkv_bias):
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size
        options = {"quant_config": quant, "params_dtype": config.dtype}
        self.qkv_proj = vllm.QKVParallelLinear(
            width, width // heads, heads, config.num_key_value_heads, qkv_bias, prefix=f"{prefix}.qkv_proj", **options
        )
        self.o_proj = vllm.RowParallelLinear(width, width, False, prefix=f"{prefix}.o_proj", **options)


class Feed(nn.Module):
    def __init__(self, config, quant, prefix):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        options = {"quant_config": quant, "params_dtype": config.dtype}
        self.gate_up_proj = vllm.MergedColumnParallelLinear(
            width, [inner] * 2, False, prefix=f"{prefix}.gate_up_proj", **options
        )
        self.down_proj = vllm.RowParallelLinear(inner, width, False, prefix=f"{prefix}.down_proj", **options)


class Layer(nn.Module):
    def __init__(self, config, quant, prefix, qkv_bias):
        super().__init__()
        self.self_attn = Attention(config, quant, f"{prefix}.self_attn", qkv_bias)
        self.mlp = Feed(config, quant, f"{prefix}.mlp")


class Linears(nn.Module):
    """All linear layers of the blocks, under the names that vLLM's Llama has for them below `root`."""

    def __init__(self, config, quant, root, qkv_bias):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(config, quant, f"{root}.layers.{i}", qkv_bias) for i in range(config.num_hidden_layers)
        )


def weights(folder):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if "_proj" in name:
                    yield name, file.get_tensor(name)


def build(folder, root="model", prefixes=None, qkv_bias=False):
    """The linears of one rank, empty."""
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    mapper = vllm.WeightsMapper(STACKED, prefixes or {})
    quant = vllm.CONFIGS[described["quant_method"]].from_config(described)
    quant.packed_modules_mapping.update(PACKED)
    quant.apply_vllm_mapper(mapper.get_rename_mapper())
    model = nn.Module()
    model.add_module(root, Linears(AutoConfig.from_pretrained(folder), quant, root, qkv_bias))
    return model, mapper


def serve(folder, size=1, loader="auto", root="model", **options):
    """The filled linears of every rank."""
    ranks = []
    for rank in range(size):
        with vllm.rank_of(rank, size):
            model, mapper = build(folder, root, **options)
            if loader == "auto":
                vllm.auto_load(model, weights(folder), mapper)
            else:
                vllm.load_by_name(model, weights(folder), STACKED)
            vllm.process_weights_after_loading(model)
        ranks.append(getattr(model, root))
    return ranks


class Part(nn.Module):
    """One projection of a fused column-parallel layer, of all ranks."""

    def __init__(self, layers, index):
        super().__init__()
        self.layers, self.index = layers, index

    def forward(self, x):
        shared = getattr(self.layers[0], "num_kv_head_replicas", 1) if self.index else 1
        parts = []
        for layer in self.layers[::shared]:
            sizes = layer.output_partition_sizes
            start = sum(sizes[: self.index])
            parts.append(layer(x)[0][..., start : start + sizes[self.index]])
        return torch.cat(parts, dim=-1)


class Whole(nn.Module):
    """A row-parallel layer of all ranks, reduced."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(part)[0] for layer, part in zip(self.layers, x.chunk(len(self.layers), -1), strict=True))


def logits(folder, ranks):
    """What the model in `folder` puts out if `ranks` compute its projections."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for i, block in enumerate(model.model.layers):
        at = [rank.layers[i] for rank in ranks]
        for name, fused, index in (
            ("self_attn.q_proj", "self_attn.qkv_proj", 0),
            ("self_attn.k_proj", "self_attn.qkv_proj", 1),
            ("self_attn.v_proj", "self_attn.qkv_proj", 2),
            ("mlp.gate_proj", "mlp.gate_up_proj", 0),
            ("mlp.up_proj", "mlp.gate_up_proj", 1),
        ):
            block.set_submodule(name, Part([layer.get_submodule(fused) for layer in at], index))
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            block.set_submodule(name, Whole([layer.get_submodule(name) for layer in at]))
    return outputs(model)


def outputs(model):
    tokens = torch.arange(min(17, model.config.vocab_size))[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits
