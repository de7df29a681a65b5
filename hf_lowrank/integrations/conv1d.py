"""`transformers.pytorch_utils.Conv1D`: a linear that stores its weight as (in, out), found in GPT-2 and its kin."""

from transformers.pytorch_utils import Conv1D

from ..kinds import LinearKind, register_linear_kind


class Conv1DKind(LinearKind):
    """A transposed linear whose constructor takes sizes only."""

    def __init__(self):
        super().__init__(Conv1D, transposed=True)

    def empty(self, in_features, out_features, bias):
        layer = Conv1D(out_features, in_features)
        if not bias:
            layer.bias = None
        return layer.to("meta")


register_linear_kind(Conv1DKind())
