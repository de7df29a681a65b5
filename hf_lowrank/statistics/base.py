"""What a statistic is: something accumulated over the calibration tokens at one input."""

from typing import ClassVar

from ..registry import Registry


STATISTICS = Registry("statistic")
register_statistic = STATISTICS.register


class Statistic:
    """Base class of statistics; a subclass is one file in `hf_lowrank/statistics`, registered by `register_statistic`.

    One object serves one *input*: linears that read the same tensor share it.

    Args:
        in_features (`int`): size of the last dimension of the input.
        device (`torch.device`): where to accumulate; the device of the layer.
    """

    name: ClassVar[str]

    def __init__(self, in_features, device):
        raise NotImplementedError

    @staticmethod
    def shape(out_features, in_features):
        """Shape of the finished tensor."""
        raise NotImplementedError

    def update(self, rows):
        """Account for some tokens, `(tokens, in)`, padding already removed."""
        raise NotImplementedError

    def result(self):
        """The finished tensor, float64."""
        raise NotImplementedError
