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
import each other, torch and vLLM only: vLLM 0.33 pins a transformers older than the rest of this package can use, and
no process of vLLM should import all of it for a model that is none of its business. `pip install --no-deps hf-lowrank`
puts it into the environment of vLLM.

Not served, with an error that says so: factorized experts, embeddings and output heads; fused layers whose parts vLLM
names in another way than by q, k, v or numbers; a bias that a method added where vLLM leaves adding it to others; a
basis shared with a layer of another pipeline stage; `--load-format dummy`. Layers that share a basis across depth have
a copy each. Weights are loaded once: loading into a running server, vLLM's adapters and offloading for factorized
layers, and layers whose `weight` vLLM reads itself (`kv_b_proj` of latent attention) are not provided for.

Written against the sources of vLLM 0.33.0 (commit 4ba787ec9). The tests run stand-ins for its layers and loaders, in
one process on the CPU, for tensor-parallel groups of 1, 2 and 4; the linear layers, the weight loading and the plugin
discovery of these sources were run in the same way. Not run: vLLM as a whole, its compiled kernels, CUDA graphs, GPUs,
several processes.
"""


def register():
    """Let vLLM know the quantization method `"lowrank"`; may be called any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from .checkpoint import QUANT_METHOD

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from .config import LowRankConfig

        register_quantization_config(QUANT_METHOD)(LowRankConfig)
