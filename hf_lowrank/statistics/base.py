"""What a statistic is: something accumulated over the calibration tokens at one input."""

from typing import ClassVar

from ..registry import Registry


STATISTICS = Registry("statistic")
register_statistic = STATISTICS.register


class Statistic:
    """Base class of statistics; a subclass is one file in `hf_lowrank/statistics`, registered by `register_statistic`.

    A statistic of inputs serves one input: linears that read the same tensor share it. A statistic of gradients
    belongs to one linear, and makes the pass run backward.

    Args:
        features (`int`): size of the last dimension of what is observed.
        device (`torch.device`): where to accumulate; the device of the layer.

    Class attributes:
        of_gradients (`bool`): whether it observes gradients at the output rather than the input.
    """

    name: ClassVar[str]
    of_gradients: ClassVar[bool] = False

    def __init__(self, features, device):
        raise NotImplementedError

    @staticmethod
    def shape(out_features, in_features):
        """Shape of the finished tensor."""
        raise NotImplementedError

    def update(self, rows):
        """Account for some tokens, `(tokens, features)`, padding already removed."""
        raise NotImplementedError

    def result(self):
        """The finished tensor, float64."""
        raise NotImplementedError
