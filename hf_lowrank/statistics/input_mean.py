import torch

from ._gram import ROWS
from .base import Statistic, register_statistic


@register_statistic("input_mean")
class InputMean(Statistic):
    r"""Mean of a layer's inputs over all tokens.

        mu = mean_t x_t

    The mean of its outputs is `W mu + b`, so that layers with one input share it.

    Shapes:
        result `(in,)`, float64.
    """

    def __init__(self, features, device):
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._tokens = 0

    @staticmethod
    def shape(out_features, in_features):
        return (in_features,)

    def update(self, inputs):
        for block in inputs.split(ROWS):
            self._sum += block.double().sum(0)
        self._tokens += len(inputs)

    def combine(self, add):
        self._sum = add(self._sum)
        self._tokens = int(add(torch.tensor(self._tokens, device=self._sum.device)))

    def result(self):
        return self._sum / max(self._tokens, 1)
