"""The linear maps that passes change, and which of them can be."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import CalibrationError, ConfigError, LowRankError
from ..formats import FormatLinear
from ..kinds import kind_of
from ..surgery import tied_weights
from ._trial import lender_of


def check_arguments(model, inputs):
    """Refuse what no pass can work on: no module, no batch of tensors, or weights that are not in memory."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(inputs, Mapping) or not any(isinstance(value, torch.Tensor) for value in inputs.values()):
        raise CalibrationError(
            f"`inputs` must be a dict of tensors, as a tokenizer or processor makes it with `return_tensors='pt'`, "
            f"not {type(inputs).__name__}."
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise LowRankError(
            "Some weights of the model are on disk or on the meta device, where they cannot be changed; load it "
            "without offloading."
        )


def fixed_parameters(model):
    """Full names of parameters that more than their own layer reads."""
    fixed = tied_weights(model)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        lender = lender_of(module)
        if lender is not None:
            fixed |= {f"{layer}.{key}" for layer in (name, names.get(lender)) for key in module.lent}
    return fixed


def linear_maps(block):
    """`{name: layer}` of every linear of `block`, the children of factorized ones not among them."""
    found = {}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and (isinstance(module, FormatLinear) or kind_of(module) is not None):
            found[name] = module
    return found


def is_plain(name, layer, names, fixed):
    """Whether `layer`, called `name`, holds the tensors `names` by itself, as plain numbers."""
    # Adapters and quantizers replace the children or the tensors.
    plain = all(type(child) is nn.Linear for child in layer.children())
    tensors = layer.state_dict(keep_vars=True)
    plain = plain and all(type(tensor.data) is torch.Tensor for tensor in tensors.values())
    return bool(names) and plain and not any(f"{name}.{key}" in fixed for key in names)


def shape_of(layer):
    """`(out, in)` of a linear map."""
    site = layer if isinstance(layer, FormatLinear) else kind_of(layer).sites("", layer)[0]
    return site.out_features, site.in_features
