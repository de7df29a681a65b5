"""What a statistic is: something accumulated over the calibration tokens at one linear layer."""

from typing import ClassVar

from ..errors import ConfigError
from ..registry import Registry


STATISTICS = Registry("statistic")
register_statistic = STATISTICS.register

INPUTS, GRADIENTS, SAMPLES, COPIES = "inputs", "gradients", "samples", "copies"


class Statistic:
    """Base class of statistics; a subclass is one file in `hf_lowrank/statistics`, registered by `register_statistic`.

    A statistic of inputs serves one input: linears that read the same tensor share it. One that sees gradients belongs
    to one linear, and makes the pass run backward.

    Args:
        features (`int`): size of the last dimension of the first thing it sees.
        device (`torch.device`): where to accumulate; the device of the layer.

    Class attributes:
        sees (`tuple[str]`): what `update` is given, in this order: `"inputs"` `(tokens, in)`, `"gradients"` of the
            loss at the outputs of the same tokens `(tokens, out)`, `"samples"`: the number of the sample of each token
            `(tokens,)`, counted from 0 over the whole pass; `"copies"`: the number of the weight each token meets
            `(tokens,)`, which is 0 except where one layer holds several (experts).
        of_labels (`bool`): whether gradients are those of the model's own loss on the labels in the batch, where it
            has any; else, labels are drawn from the model's predictions.
        needs_labels (`bool`): whether labels drawn from the model's predictions tell nothing, so that batches need
            some; those of a causal model's text are its tokens.
        collected (`bool`): whether a pass over data collects it; what training leaves behind is never accumulated.
    """

    name: ClassVar[str]
    sees: ClassVar[tuple] = (INPUTS,)
    of_labels: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    collected: ClassVar[bool] = True

    def __init__(self, features, device):
        raise NotImplementedError

    @classmethod
    def empty(cls, out_features, in_features, device):
        """One that has seen nothing yet, of a layer of this shape."""
        return cls(in_features if cls.sees[0] == INPUTS else out_features, device)

    @staticmethod
    def shape(out_features, in_features):
        """Shape of the finished tensor."""
        raise NotImplementedError

    @classmethod
    def join(cls, tensors):
        """The statistic of a group of layers whose weights are stacked along out.

        Args:
            tensors (`list[torch.Tensor]`): finished, one for each distinct input where it is a statistic of inputs,
                else one for each layer, in the order of the group.

        Raises:
            ConfigError: nobody has said what it is for a group.
        """
        raise ConfigError(
            f"The statistic {cls.name!r} has no meaning for a group of layers; use a method that reads others, or "
            "leave `joint_groups` and `share_layers` unset."
        )

    def update(self, *seen):
        """Account for some tokens of one batch, padding already removed; all tokens of a sample come in one batch.

        A statistic of gradients is given all calls of its layer in the batch at once.
        """
        raise NotImplementedError

    def combine(self, add):
        """Account for what other processes have seen too.

        Args:
            add (`Callable`): gives the sum over all processes of a tensor; each calls it as often, in one order.
        """
        raise NotImplementedError

    def result(self):
        """The finished tensor, float64."""
        raise NotImplementedError
