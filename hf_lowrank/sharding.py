"""Parameters that a training framework has split over processes."""

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .errors import TargetError


def refuse_sharded(parameters, what="mixed-rank layers"):
    """Refuse parameters of which this process holds a part only.

    Args:
        parameters (`dict[str, torch.Tensor]`): by name.
        what (`str`, defaults to `"mixed-rank layers"`): what needs whole weights, in the plural.

    Raises:
        TargetError: naming the first.
    """
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            raise TargetError(
                f"DeepSpeed ZeRO-3 has split {name}, and {what} need whole weights; use DistributedDataParallel."
            )
        if isinstance(parameter, DTensor):
            raise TargetError(
                f"{name} is a DTensor, split by FSDP or tensor parallelism, and {what} need whole weights; use "
                "DistributedDataParallel."
            )


def refuse_fsdp(model, what):
    """Refuse a model whose parameters the first version of FSDP has flattened; arguments as in [`refuse_sharded`].

    Raises:
        TargetError: `model` is wrapped, or a part of it is.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TargetError(
            f"FSDP has flattened and split the parameters of this {type(model).__name__}, and {what} need whole "
            "weights; use DistributedDataParallel."
        )
