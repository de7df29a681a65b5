"""Write an adapter's update into a layer, and take it out again, bit for bit."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import NonFiniteError, TargetError
from ..formats import FormatLinear
from ..rewrite import check_rewritable


# The attribute of a layer that holds its Kept, while anything is merged.
KEPT = "_before_merging"


@dataclass
class Kept:
    """The weight of a layer before anything was merged, and the factors `(left, right)` of what was added since."""

    weight: torch.Tensor
    updates: list = field(default_factory=list)


def check_mergeable(base):
    """Refuse a layer whose weight cannot take an update without loss.

    Raises:
        TargetError: naming what to do instead.
        ComputedWeightError: the same of a factorized layer.
    """
    if isinstance(base, FormatLinear):
        check_rewritable(base)
        return
    weight = base._parameters.get("weight")
    plain = weight is not None and type(weight.data) is torch.Tensor and weight.dtype.is_floating_point
    if not isinstance(base, (nn.Linear, Conv1D)) or not plain:
        raise TargetError(
            f"An adapter can be merged into a floating-point weight of torch.nn.Linear or Conv1D, not into this "
            f"{type(base).__name__}, whose weight is computed or quantized. Keep it unmerged, or merge it into the "
            "model before quantization."
        )


def merge_into(base, left, right):
    """Add `left @ right` to the weight of a dense `base`.

    Subtracting the update again would leave rounding behind, so the first weight is kept with the layer: one more in
    memory as long as merging may be undone.

    Args:
        base (`torch.nn.Module`): the layer that the adapter wraps.
        left (`Tensor`): `(out, R)`, scale included.
        right (`Tensor`): `(R, in)`.

    Raises:
        TargetError: as for [`check_mergeable`].
        NonFiniteError: the merged weight would hold NaN or infinite values.
    """
    check_mergeable(base)
    before = base.weight.data
    merged = _add_product(before, left, right, transposed=isinstance(base, Conv1D))
    if not torch.isfinite(merged).all():
        raise NonFiniteError(
            f"The merged weight of shape {tuple(merged.shape)} would hold NaN or infinite values; look for them in "
            "the adapter, and at its scale. This weight is as it was; call `unmerge_adapter` for those merged before."
        )
    exchange_weight(base, merged)
    vars(base)[KEPT].updates.append((left.detach(), right.detach()))


def exchange_weight(base, weight):
    """Put `weight`, a tensor, in place of that of a dense `base`, which is kept if it is the first."""
    vars(base).setdefault(KEPT, Kept(base.weight.data))
    base.weight.data = weight


def first_weight(base):
    """The weight of `base` before anything was merged into it."""
    kept = vars(base).get(KEPT)
    return base.weight if kept is None else kept.weight


def unmerge_from(base):
    """Undo every [`merge_into`] and [`exchange_weight`] of `base`: to the bit, if nothing else has changed the weight.

    Where adapters of another tuner have written into it meanwhile, updates are subtracted from what is there.
    """
    kept = vars(base).pop(KEPT, None)
    if kept is None:
        return
    # The model may have been moved or cast in between.
    now, before = base.weight.data, kept.weight.to(base.weight.device, base.weight.dtype)
    if not kept.updates:
        base.weight.data = before
        return
    lefts, rights = zip(*kept.updates, strict=True)
    left, right, transposed = torch.cat(lefts, 1), torch.cat(rights), isinstance(base, Conv1D)
    merged = _add_product(before, left, right, transposed)
    # Sums of some units in the last place, more where the weight was cast after it was merged.
    tolerance = 8 * torch.finfo(now.dtype).eps * max(merged.abs().max(), before.abs().max())
    alone = (now - merged).abs().max() <= tolerance
    base.weight.data = before if alone else _add_product(now, -left, right, transposed)


def settle(base):
    """Give up what could undo merging; the weight stays as it is."""
    vars(base).pop(KEPT, None)


def _add_product(weight, left, right, transposed):
    """`weight + left @ right`, computed in float32 or wider, in the weight's dtype and layout."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    update = left.to(weight.device, wide) @ right.to(weight.device, wide)
    return (weight.to(wide) + (update.T if transposed else update)).to(weight.dtype)
