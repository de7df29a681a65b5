"""The backward passes that make a Fisher matrix: of labels from the model, or of those in the data."""

from collections.abc import Mapping

import torch

from ..errors import StatisticsError
from .masks import IGNORED, batch_size


# Predictions handled at once: what is computed from them in float32 is several times their size.
ROWS = 256


def fisher_backward(output, mask_of, generator, problem_type=None):
    """Run the negative log-likelihood, summed over tokens, of labels drawn from the model's own predictions backward.

        d loss / d logits = softmax(logits) - one_hot(label),    of several labels at once sigmoid(logits) - labels

    Where the places of an image are predicted, classes are dimension 1 of four. Without logits (a base model) and in
    a regression, the sum of the outputs with Gaussian weights, whose gradients have the same second
    moments as those of a Gaussian likelihood; outputs of padding have no weight.

    Args:
        output (`ModelOutput`): what the model returned.
        mask_of (`Callable`): gives the tokens of an output that count, or `None` for all.
        generator (`torch.Generator`): of the labels or weights.
        problem_type (`str`, *optional*): what transformers' config says under this name.

    Raises:
        StatisticsError: predictions that are NaN or infinite.
    """
    tensors = loss_tensors(output)
    logits = _logits(output)
    if logits is None or logits.shape[-1] == 1 or problem_type == "regression":
        tensors = [t for t in tensors if t.requires_grad]
        gradients = [_gaussian_gradient(t, mask_of(t), generator) for t in tensors]
    elif problem_type == "multi_label_classification":
        gradients = [_bernoulli_gradient(logits.detach(), generator)]
    elif logits.ndim == 4:
        gradients = [_likelihood_gradient(logits.detach().movedim(1, -1), None, generator).movedim(-1, 1)]
    else:
        gradients = [_likelihood_gradient(logits.detach(), mask_of(logits), generator)]
    torch.autograd.backward(tensors, gradients)


def loss_tensors(output):
    """What `fisher_backward` starts from: the logits, or every floating tensor of a model without them."""
    logits = _logits(output)
    return [t for t in ([logits] if logits is not None else _tensors(output)) if t.is_floating_point()]


def _logits(output):
    return output.get("logits") if isinstance(output, Mapping) else None


def _gaussian_gradient(output, mask, generator):
    gradient = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return _of_tokens(gradient, mask)


def _bernoulli_gradient(logits, generator):
    probabilities = logits.float().sigmoid()
    labels = torch.rand(logits.shape, generator=generator, device=logits.device) < probabilities
    return (probabilities - labels.float()).to(logits.dtype)


def _of_tokens(gradient, mask):
    """`gradient` with zeros for what is not in `mask`, where that tells its rows apart."""
    if mask is not None and mask.shape == gradient.shape[:-1]:
        gradient[~mask.to(gradient.device)] = 0
    return gradient


def _likelihood_gradient(logits, mask, generator):
    """The gradient of the log-likelihood of sampled labels with respect to `logits`, whose shape and dtype it has."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows, target in zip(
        logits.reshape(-1, logits.shape[-1]).split(ROWS), gradient.view(-1, logits.shape[-1]).split(ROWS), strict=True
    ):
        probabilities = rows.float().softmax(-1)
        cumulated = probabilities.cumsum(-1)
        total = cumulated[:, -1:]
        if not torch.isfinite(total).all():
            raise StatisticsError(
                "The predictions for the calibration data hold NaN or infinite values; the model overflows. Load it "
                "in float32 or bfloat16 for calibration, or check its weights and the data."
            )
        # By inversion of the distribution function: one random number a token instead of one a word.
        thresholds = total * torch.rand(total.shape, generator=generator, device=total.device)
        labels = torch.searchsorted(cumulated, thresholds, right=True).clamp(max=logits.shape[-1] - 1)
        target.copy_(probabilities.scatter_add_(-1, labels, -torch.ones_like(total)))
    return _of_tokens(gradient, mask)


def labelled_backward(output, batch):
    """Run the model's own loss for the labels in `batch`, as a sum over samples, backward.

    transformers' losses are means, over labelled tokens where each token has a class, else over samples. Of the former
    a causal model drops the first of each sequence, which is counted here: a factor close to 1.

    Args:
        output (`ModelOutput`): what the model returned.
        batch (`dict`): what it was given.

    Returns:
        Whether there was a loss: the model computes none without labels.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if loss is None:
        return False
    labels = batch.get("labels")
    of_tokens = isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    (loss.float() * ((labels != IGNORED).sum() if of_tokens else batch_size(batch))).backward()
    return True


def _tensors(output):
    """The tensors a model returned, whatever it wraps them in."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, torch.Tensor)]
