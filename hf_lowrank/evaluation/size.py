"""What a model takes: parameters, and bytes as stored."""

from dataclasses import dataclass

import torch

from ..sizes import numbers, tensor_bytes
from ..surgery import factorized, match_sites


@dataclass(frozen=True)
class Size:
    """Parameters and bytes, tied weights counted once.

    Args:
        parameters (`int`): of the whole model, with the integers that factorized formats store.
        bytes (`int`): of these and of saved buffers, as stored: packed weights with their scales and zeros.
        linear_parameters (`int`): of the weights of the linears that are targets by default, factors included.
        linear_bytes (`int`): of the same, as stored.
    """

    parameters: int
    bytes: int
    linear_parameters: int
    linear_bytes: int


def size_of(model):
    """The [`Size`] of a model, dense, factorized or quantized with packed tensors."""
    weights = [model.get_parameter(site.weight_name) for site in match_sites(model)]
    for name, kind in factorized(model).items():
        weights.extend(kind.stored(model, name).values())
    linears = {id(tensor): tensor for tensor in weights}
    parameters = {id(p): p for p in model.parameters()}
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    # Of what the linears store, scales that a quantizer keeps beside a packed weight are no parameters.
    indices = {id(b) for b in model.buffers()} & set(linears)
    counted = parameters | {key: linears[key] for key in indices}
    return Size(
        parameters=sum(numbers(t) for t in counted.values()),
        bytes=sum(tensor_bytes(t) for t in saved.values()),
        linear_parameters=sum(numbers(t) for key, t in linears.items() if key in counted),
        linear_bytes=sum(tensor_bytes(t) for t in linears.values()),
    )
