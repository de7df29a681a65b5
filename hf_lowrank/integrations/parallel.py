"""Tensor parallelism of factorized layers: rewrite each layer's style into styles of its two factors."""

import functools

import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.utils import is_dtensor

from ..errors import ConfigError
from ..surgery import factorized


def _colwise(name):
    # Outputs are split: `left` by rows; `right` is small and replicated.
    return {
        f"{name}.left.weight": "colwise",
        f"{name}.left.bias": "colwise",
        f"{name}.left": "colwise",
        f"{name}.right.weight": "replicate",
        f"{name}.right": "replicate",
    }


def _rowwise(name):
    # Inputs are split: `right` by columns, so that only `rank` numbers a token are summed; `left` is replicated.
    return {
        f"{name}.right.weight": "rowwise",
        f"{name}.right": "rowwise",
        f"{name}.left.weight": "replicate",
        f"{name}.left.bias": "replicate",
        f"{name}.left": "replicate",
    }


STYLES = {"colwise": _colwise, "rowwise": _rowwise}


def agreed(model, tensor):
    """Rank 0's `tensor` on every process that loads a part of `model`, so that all come to the same decisions."""
    if getattr(model, "_device_mesh", None) is None or not dist.is_initialized():
        return tensor
    device = next(model.buffers(), tensor).device if dist.get_backend() == "nccl" else tensor.device
    shared = tensor.to(device)
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


def local_part(model, name, tensor):
    """This process's part of a parameter that is split over processes; other parameters as they are.

    Every process has factorized the whole weight. Solvers may differ in the last bits between machines, and parts of
    different factors do not fit together, so that rank 0's factors count.
    """
    reference = model.get_parameter(name)
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
    for name in factorized(model):
        style = expanded.pop(name, None)
        for key in [key for key in expanded if key.startswith(f"{name}.")]:
            style = style or expanded[key]
            del expanded[key]
        if style is None:
            continue
        if style not in STYLES:
            raise ConfigError(
                f"Tensor parallelism of {name} has style {style!r}; factorized layers can be split {sorted(STYLES)}. "
                "Leave it dense with `exclude_modules`."
            )
        parameters = {key for key, _ in model.get_submodule(name).named_parameters(prefix=name)}
        existing = parameters | {f"{name}.left", f"{name}.right"}
        expanded.update({key: value for key, value in STYLES[style](name).items() if key in existing})
    return expanded
