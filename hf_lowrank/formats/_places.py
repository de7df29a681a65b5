"""What integers in a checkpoint may be: nothing else about them could be noticed, and each changes the matrix."""

import torch

from ..errors import DAMAGED, CheckpointError
from ._row_supports import unpack_mask


def check_order(order, owner):
    """Refuse an `order` that is no permutation; `owner` is the layer, for the message."""
    places = torch.arange(len(order), device=order.device)
    if not torch.equal(order.long().sort().values, places):
        raise CheckpointError(f"`order` of {owner} does not hold every output once. {DAMAGED}")


def check_rising(indices, limit, owner):
    """Refuse `indices` that do not rise within `0 .. limit - 1` along the last dimension."""
    indices = indices.long()
    inside = bool(((indices >= 0) & (indices < limit)).all())
    if not (inside and bool((indices.diff(dim=-1) > 0).all())):
        raise CheckpointError(f"`indices` of {owner} do not rise within 0..{limit - 1}. {DAMAGED}")


def check_mask(mask, atoms, count, owner):
    """Refuse a packed mask of which a row has not `count` bits among the first `atoms`, and none behind them."""
    bits = unpack_mask(mask, 8 * mask.shape[1])
    if bool(bits[:, atoms:].any()) or not bool((bits.sum(-1) == count).all()):
        raise CheckpointError(f"`mask` of {owner} does not name {count} of {atoms} atoms a row. {DAMAGED}")
