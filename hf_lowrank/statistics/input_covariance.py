import torch

from ._gram import Gram
from .base import INPUTS, SAMPLES, Statistic, register_statistic


# Sequences that share one mean.
GROUP = 32


@register_statistic("input_covariance")
class InputCovariance(Statistic):
    r"""Covariance of a layer's inputs about the mean of their own group, pooled over groups of 32 sequences.

        Sigma = sum_g sum_{t in g} (x_t - mu_g) (x_t - mu_g)^T / sum_g (n_g - 1)

    For groups of one size this is the mean of their unbiased covariances; a last group that is smaller counts by its
    degrees of freedom. The covariance of the outputs is `W Sigma W^T`, so that layers with one input share it.

    Products of at most 2048 rows in float32, summed in float64; of differences to the first mean that was seen, since
    a covariance is what is left when a possibly much larger mean has cancelled. Where several processes collect, each
    has groups of its own.

    Shapes:
        result `(in, in)`, symmetric, float64.

    Reference:
        The pooled covariance of Bolaco, EMNLP Findings 2024, https://arxiv.org/abs/2405.10616, which takes it of the
        outputs. Groups and their size are the paper's, the weight of a smaller last group is ours.
    """

    sees = (INPUTS, SAMPLES)

    def __init__(self, features, device):
        self._gram = Gram(features, device)
        self._origin = None
        # {group: (tokens, their sum)}
        self._groups = {}
        self._pooled = None

    @staticmethod
    def shape(out_features, in_features):
        return (in_features, in_features)

    def update(self, inputs, samples):
        if not len(inputs):
            return
        if self._origin is None:
            self._origin = inputs.float().mean(0)
        inputs = inputs.float() - self._origin
        self._gram.update(inputs)
        groups = samples // GROUP
        for group in groups.unique().tolist():
            rows = inputs[groups == group]
            tokens, total = self._groups.get(group, (0, 0))
            self._groups[group] = (tokens + len(rows), total + rows.double().sum(0))

    def combine(self, add):
        # Within groups the origin, which differs between processes, has cancelled.
        self._pooled = tuple(add(part) for part in self._pool())

    def result(self):
        scatter, freedom = self._pooled or self._pool()
        return scatter / freedom.clamp(min=1)

    def _pool(self):
        """Scatter about the means of the groups, and its degrees of freedom; takes over the accumulator."""
        scatter = self._gram.result()
        for tokens, total in self._groups.values():
            scatter -= torch.outer(total, total) / tokens
        freedom = sum(tokens - 1 for tokens, _ in self._groups.values())
        return scatter, torch.tensor(freedom, device=scatter.device)
