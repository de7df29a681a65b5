import torch

from ._gram import ROWS
from .base import Statistic, register_statistic


@register_statistic("input_norm")
class InputNorm(Statistic):
    r"""Two magnitudes of each input channel.

        row 0: mean_t |x_tj|,    row 1: sqrt(mean_t x_tj^2)

    One statistic, since both come from one look at the inputs and take two numbers a channel. Both are means over
    tokens: a mean over sequences of sums over their tokens differs by one factor for all channels.

    Shapes:
        result `(2, in)`, float64.
    """

    def __init__(self, features, device):
        self._sums = torch.zeros(2, features, dtype=torch.float64, device=device)
        self._tokens = 0

    @staticmethod
    def shape(out_features, in_features):
        return (2, in_features)

    def update(self, inputs):
        for block in inputs.split(ROWS):
            block = block.double()
            self._sums += torch.stack([block.abs().sum(0), block.square().sum(0)])
        self._tokens += len(inputs)

    def combine(self, add):
        self._sums = add(self._sums)
        self._tokens = int(add(torch.tensor(self._tokens, device=self._sums.device)))

    def result(self):
        means = self._sums / max(self._tokens, 1)
        return torch.stack([means[0], means[1].sqrt()])
