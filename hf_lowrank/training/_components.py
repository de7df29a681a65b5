"""The components of factors that are in order of importance, and what is left of them when the last ones go."""

import torch

from ..errors import TargetError
from ..formats import LinearFace, LowRankLinear


def component_layers(model):
    """`{name: layer}` of the layers with two plain factors, in the order of the modules.

    Raises:
        TargetError: one of them carries adapters.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    for name, layer in found.items():
        if isinstance(layer, LinearFace):
            raise TargetError(f"{name} carries adapters; call `merge_and_unload()` or `unload()` first.")
    return found


def tails(layer):
    r"""The norms `|left[:, b:]|_F` and `|right[b:]|_F` for every b from 0 to r - 1.

    Their gradient is zero, not NaN, where a tail is.

    Returns:
        Two tensors `(r,)`, in float32 or wider; they never rise with b.
    """
    wide = torch.promote_types(layer.left.weight.dtype, torch.float32)
    left = layer.left.weight.to(wide).square().sum(0)
    right = layer.right.weight.to(wide).square().sum(1)
    return _root_of_tails(left), _root_of_tails(right)


def _root_of_tails(squares):
    sums = squares.flip(0).cumsum(0).flip(0)
    positive = sums > 0
    return torch.where(positive, sums, 1.0).sqrt() * positive


@torch.no_grad()
def importance(layer):
    r"""How much of a layer depends on the components from b on: `|left[:, b:]|_F |right[b:]|_F`, `(r,)`."""
    left, right = tails(layer)
    return left * right


@torch.no_grad()
def live_rank(layer):
    """How many components are left when those at the end go whose column and row are zero; 1 at least.

    Both zero, neither gets a gradient: such a component is dead.
    """
    live = (layer.left.weight.any(0) | layer.right.weight.any(1)).nonzero()
    return int(live.max()) + 1 if len(live) else 1


@torch.no_grad()
def clear_from(layer, rank):
    """Make the components from `rank` on zero, in place."""
    layer.left.weight[:, rank:] = 0
    layer.right.weight[rank:] = 0
