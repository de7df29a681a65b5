"""Serving with vLLM: an out-of-tree quantization method behind the entry point `vllm.general_plugins`.

    vllm serve me/model-lowrank

A checkpoint selects the method by its `quant_method`, and vLLM calls [`register`] in each of its processes. Every
format is served as it is stored:

| format | one product for the first tables of a fused layer | and then |
|---|---|---|
| `low_rank` | `right` of all its modules, stacked | one product a module with `left` |
| `shared_basis` | the one `right` | one product for all `left` of neighbours |
| `pivoted` | `basis` of all its modules, stacked | one product a module with `coefficients`, one gather for all |
| dense, beside factorized ones | its weight, in the same stack | nothing |

In tensor parallelism a column-parallel layer has all of the first table in every process and cuts the second by
outputs, key and value heads as vLLM replicates them; a row-parallel layer cuts the first by inputs and has all of the
second. A pivoted module needs the basis everywhere, and each process only the coefficients of its own outputs. Biases
are vLLM's: split with the outputs, or added in the first process only.

This folder stands alone. It is installed a second time, as the top-level package `_hf_lowrank_vllm`, whose files
import each other, torch and vLLM only: vLLM 0.33 wants a transformers older than this package can use, and no process
of vLLM has to import this package for a model that is none of its business. `pip install --no-deps hf-lowrank` puts it
into the environment of vLLM.

What is not served, and says so: factorized experts, embeddings and output heads; fused layers whose parts vLLM names
in another way than by q, k, v or numbers; `--load-format dummy`; a basis shared with a layer of another pipeline
stage. Layers that share a basis across depth have a copy each. Weights are loaded once: reloading into a running
server, adapters of vLLM on factorized layers, and layers whose `weight` vLLM reads itself (`kv_b_proj` of latent
attention) are not provided for.

Written against vLLM 0.33.0 (commit 4ba787ec9).
"""


def register():
    """Let vLLM know the quantization method `"lowrank"`; may be called any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from .checkpoint import QUANT_METHOD

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from .config import LowRankConfig

        register_quantization_config(QUANT_METHOD)(LowRankConfig)
