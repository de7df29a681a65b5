import torch
from torch import nn

from .base import FormatLinear, as_parameter, check_rank, plain, register_format, shape_of


@register_format("low_rank")
class LowRankLinear(FormatLinear):
    r"""Two linears in a row, the plainest and most portable format.

        y = left(right(x)) = x R^T L^T + b,    W = L R

    Both factors are ordinary `nn.Linear` children, so PEFT, torchao, bitsandbytes, tensor parallelism and FSDP treat
    them like any other linear.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether `left` carries a bias.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.

    Shapes:
        `right.weight` `(r, in)`, `left.weight` `(out, r)`, `left.bias` `(out,)`; r (out + in) numbers and the bias.

    Raises:
        RankError: `rank` is not an integer in range.
    """

    bias_name = "left.bias"
    output_rows = ("left.weight", "left.bias")
    input_columns = ("right.weight",)

    def __init__(self, in_features, out_features, rank, bias=True, transposed=False, device=None, dtype=None):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def rank(self):
        """Number of rows of `right`, read off the weights, so that it is right after any surgery on them."""
        return shape_of(self.right)[0]

    def forward(self, x):
        return self.left(self.right(x))

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layer = cls.for_factors(factors, bias, dtype, transposed)
        layer.left.weight = as_parameter(factors.left, dtype)
        layer.right.weight = as_parameter(factors.right, dtype)
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank):
        return rank * (out_features + in_features)

    def dense_weight(self):
        left, right = plain(self.left), plain(self.right)
        wide = torch.promote_types(left.dtype, torch.float32)
        return (left.to(wide) @ right.to(wide)).to(left.dtype)

    def factors(self):
        return plain(self.left).detach().double(), plain(self.right).detach().double()
