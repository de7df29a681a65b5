"""The largest of many numbers, exactly so many."""

import torch

from .svd import require_finite


def largest(scores, fraction, what="A score"):
    """Masks of the largest entries of several tensors taken together; of equal ones, the first count.

    Args:
        scores (`list[torch.Tensor]`): finite.
        fraction (`float`): of all entries, in [0, 1]; rounded to the nearest whole number of them.
        what (`str`, defaults to `"A score"`): names the tensors in messages.

    Returns:
        `list[torch.Tensor]`: booleans of the same shapes, exactly `round(fraction * entries)` of them true.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
    require_finite(flat, what)
    count = round(fraction * flat.numel())
    if count in (0, flat.numel()):
        chosen = torch.full_like(flat, count > 0, dtype=torch.bool)
    else:
        threshold = flat.kthvalue(flat.numel() - count + 1).values
        chosen = flat > threshold
        # What a partial sort makes of equal scores is its own business, and not the same on every device.
        equal = (flat == threshold).nonzero().flatten()
        chosen[equal[: count - int(chosen.sum())]] = True
    masks = chosen.split([score.numel() for score in scores])
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]
