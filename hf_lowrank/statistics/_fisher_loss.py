"""The loss whose gradients make the Fisher matrix: labels come from the model, not from the data."""

from collections.abc import Mapping

import torch

from ..errors import StatisticsError


def fisher_loss(output, mask, generator):
    """The negative log-likelihood, summed over tokens, of labels drawn from the model's own predictions.

    Without logits (a base model), the sum of the outputs with Gaussian weights, whose gradients have the same second
    moments as those of a Gaussian likelihood.

    Args:
        output (`ModelOutput`): what the model returned.
        mask (`torch.Tensor`, *optional*): the tokens that count.
        generator (`torch.Generator`): of the labels or weights.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if logits is None or logits.shape[-1] == 1:
        tensors = [logits] if logits is not None else _tensors(output)
        floating = [t for t in tensors if t.is_floating_point() and t.requires_grad]
        noise = [torch.randn(t.shape, generator=generator, device=t.device) for t in floating]
        return sum((t.float() * n).sum() for t, n in zip(floating, noise, strict=True))
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.to(logits.device)]
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if not torch.isfinite(logits).all():
        raise StatisticsError(
            "The predictions for the calibration data hold NaN or infinite values; the model overflows. Load it in "
            "float32 or bfloat16 for calibration, or check its weights and the data."
        )
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _tensors(output):
    """The tensors a model returned, whatever it wraps them in."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, torch.Tensor)]
