"""Tensor parallelism of factorized layers: rewrite each layer's style into styles of its two factors."""

import functools

import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.utils import is_dtensor

from ..errors import ConfigError
from ..surgery import factorized


# What each style of a dense layer becomes, by format: the style of every child, a parameter's like its module's.
# Where inputs are split, the first table is split by columns, so that only `rank` numbers a token are summed.
STYLES = {
    ("low_rank", "colwise"): {"right": "replicate", "left": "colwise"},
    ("low_rank", "rowwise"): {"right": "rowwise", "left": "replicate"},
    # A borrower has no `right`, and uses the lender's in the lender's style.
    ("shared_basis", "colwise"): {"right": "replicate", "left": "colwise"},
    ("shared_basis", "rowwise"): {"right": "rowwise", "left": "replicate"},
    ("pivoted", "rowwise"): {"basis": "rowwise", "coefficients": "replicate", "output_bias": "replicate"},
}


def agreed(model, tensor):
    """Rank 0's `tensor` on every process that loads a part of `model`, so that all come to the same decisions."""
    if getattr(model, "_device_mesh", None) is None or not dist.is_initialized():
        return tensor
    device = next(model.buffers(), tensor).device if dist.get_backend() == "nccl" else tensor.device
    shared = tensor.to(device)
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


def local_part(model, name, tensor):
    """This process's part of a parameter that is split over processes; everything else as it is.

    Every process has factorized the whole weight. Solvers may differ in the last bits between machines, and parts of
    different factors do not fit together, so that rank 0's factors count.
    """
    owner, _, leaf = name.rpartition(".")
    reference = getattr(model.get_submodule(owner), leaf)
    device_mesh = getattr(model, "_device_mesh", None)
    if device_mesh is None or not dist.is_initialized():
        return tensor
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=0)
    if not is_dtensor(reference):
        return tensor
    return DtensorShardOperation(reference).shard_tensor(tensor, device=tensor.device, dtype=tensor.dtype)


def install_parallel_plans():
    """Make models expand their tensor-parallel plan for factorized layers as well; idempotent.

    The plan itself keeps its keys, which other code reads.
    """
    original = PreTrainedModel._expand_parallel_plan
    if hasattr(original, "lowrank_plans"):
        return

    @functools.wraps(original)
    def expand_parallel_plan(self, plan):
        return _for_factors(self, original(self, plan))

    expand_parallel_plan.lowrank_plans = True
    PreTrainedModel._expand_parallel_plan = expand_parallel_plan


def _for_factors(model, expanded):
    found = factorized(model)
    quantization = getattr(model.config, "quantization_config", None)
    if found and getattr(quantization, "inner", None) is not None:
        raise ConfigError(
            "Tensor parallelism cannot split quantized factors; load factors that are not quantized, or on one device."
        )
    for name in found:
        style = expanded.pop(name, None)
        for key in [key for key in expanded if key.startswith(f"{name}.")]:
            style = style or expanded[key]
            del expanded[key]
        if style is None:
            continue
        layer = model.get_submodule(name)
        if (layer.name, style) not in STYLES:
            raise ConfigError(
                f"Tensor parallelism of {name} has style {style!r}, in which {layer.name!r} cannot be split; formats "
                f"and styles that can: {sorted(STYLES)}. Factorize with format='low_rank' (of a model in memory, "
                "hf_lowrank.truncate(model, format='low_rank')), or leave it dense with `exclude_modules`."
            )
        for child, how in STYLES[layer.name, style].items():
            # While weights stream in, the layer has placeholders too, which belong to no style.
            keys = [key for key, _ in [*layer.named_parameters(), *layer.named_children()]]
            expanded.update({f"{name}.{key}": how for key in keys if key.partition(".")[0] == child})
    return expanded
