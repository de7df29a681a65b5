import torch
from torch import nn

from .base import FormatLinear, as_parameter, check_rank, plain, register_format


@register_format("dense", listed=False)
class DenseLinear(FormatLinear):
    r"""An ordinary linear that a checkpoint has to describe, since it is narrower than its architecture says.

        y = x W^T + b

    [`prune_channels`] makes such layers. It is no way to store factors, so that `LowRankConfig` does not offer it.
    `linear` is an ordinary `nn.Linear` child.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`, *optional*): not needed; in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether `linear` carries a bias.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.

    Shapes:
        `linear.weight` `(out, in)`, `linear.bias` `(out,)`; out in numbers and the bias.

    Raises:
        RankError: `rank` is not an integer in range.
    """

    bias_name = "linear.bias"
    output_rows = ("linear.weight", "linear.bias")
    input_columns = ("linear.weight",)
    tensors = 1

    def __init__(self, in_features, out_features, rank=None, bias=True, transposed=False, device=None, dtype=None):
        super().__init__(in_features, out_features, transposed)
        if rank is not None:
            check_rank(rank, out_features, in_features)
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def rank(self):
        """The most that a weight of this shape can have."""
        return min(self.out_features, self.in_features)

    def forward(self, x):
        return self.linear(x)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layer = cls.for_factors(factors, bias, dtype, transposed)
        layer.linear.weight = as_parameter(factors.product(), dtype)
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank):
        return out_features * in_features

    def dense_weight(self):
        weight = plain(self.linear)
        # A copy, since it stands for something computed: nobody may write through it.
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).to(weight.dtype)
