import torch
from torch import nn

from ..checks import is_integer
from ..errors import DAMAGED, CheckpointError
from .base import FormatLinear, as_parameter, check_rank, plain, register_format, shape_of


@register_format("weighted_bases")
class WeightedBasesLinear(FormatLinear):
    r"""A sum of bases with a weight each, and perhaps some added ones: what [`BasisSelectionCallback`] trains.

        y = left(right(x) * scale^2) + added_left(added_right(x)),    W = left diag(scale^2) right + added

    Of an SVD, `scale^2` are the singular values. A basis of scale 0 is out: its scale has no gradient. The layer is
    larger than two factors of the same rank, and meant for training; [`truncate`] with format="low_rank" makes it one
    of these.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): number of weighted bases, in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether `left` carries a bias.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        extra_rank (`int`, defaults to 0): number of added bases, up to `min(out, in)`.

    Shapes:
        `right.weight` `(r, in)`, `left.weight` `(out, r)`, `left.bias` `(out,)`, `scale` `(r,)`; with added bases
        `added_right.weight` `(extra, in)`, `added_left.weight` `(out, extra)`. r (out + in + 1) numbers without these.

    Raises:
        RankError: `rank` is not an integer in range.

    Reference:
        Basel, 2405.15877, TMLR 2025.
    """

    bias_name = "left.bias"
    tensors = 5
    output_rows = ("left.weight", "left.bias", "added_left.weight")
    input_columns = ("right.weight", "added_right.weight")

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        extra_rank=0,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))
        self.added_right = self.added_left = None
        if extra_rank:
            check_rank(extra_rank, out_features, in_features)
            self.added_right = nn.Linear(in_features, extra_rank, bias=False, device=device, dtype=dtype)
            self.added_left = nn.Linear(extra_rank, out_features, bias=False, device=device, dtype=dtype)

    @property
    def extra_rank(self):
        """Number of added bases."""
        return 0 if self.added_right is None else shape_of(self.added_right)[0]

    @property
    def rank(self):
        """Number of bases, those that are out and the added ones among them, up to `min(out, in)`."""
        return min(self.scale.numel() + self.extra_rank, self.out_features, self.in_features)

    def spec(self):
        spec = {**super().spec(), "rank": self.scale.numel()}
        return {**spec, "extra_rank": self.extra_rank} if self.extra_rank else spec

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        extra = spec.get("extra_rank", 0)
        if not is_integer(extra, 0, min(in_features, out_features)):
            raise CheckpointError(
                f"`extra_rank`={extra!r} of a layer with weighted bases must be an integer in 0.."
                f"{min(in_features, out_features)}. {DAMAGED}"
            )
        return cls(in_features, out_features, spec.get("rank"), bias=bias, extra_rank=extra, **kwargs)

    def forward(self, x):
        y = self.left(self.right(x) * self.scale.square())
        return y if self.added_left is None else y + self.added_left(self.added_right(x))

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layer = cls.for_factors(factors, bias, dtype, transposed)
        columns, rows = factors.left.norm(dim=0), factors.right.norm(dim=1)
        layer.left.weight = as_parameter(factors.left / torch.where(columns > 0, columns, 1.0), dtype)
        layer.right.weight = as_parameter(factors.right / torch.where(rows > 0, rows, 1.0)[:, None], dtype)
        layer.scale = as_parameter((columns * rows).sqrt(), dtype)
        return layer

    def add_bases(self, count, generator):
        """Add `count` bases that are zero to begin with: `added_left` 0, `added_right` of variance 1 / count."""
        options = {"bias": False, "device": "meta", "dtype": self.left.weight.dtype}
        self.added_right = nn.Linear(self.in_features, count, **options)
        self.added_left = nn.Linear(count, self.out_features, **options)
        drawn = torch.randn(count, self.in_features, generator=generator) / count**0.5
        zero = torch.zeros(self.out_features, count)
        device = self.left.weight.device
        self.added_right.weight = as_parameter(drawn.to(device), options["dtype"])
        self.added_left.weight = as_parameter(zero.to(device), options["dtype"])

    @classmethod
    def cost(cls, out_features, in_features, rank, extra_rank=0):
        return rank * (out_features + in_features + 1) + extra_rank * (out_features + in_features)

    def dense_weight(self):
        left, right = self._pair(torch.promote_types(self.left.weight.dtype, torch.float32))
        return (left @ right).to(self.left.weight.dtype)

    def factors(self):
        left, right = self._pair(torch.float64)
        live = left.any(0).nonzero().flatten()
        # One has to be there, whatever it is.
        live = live if len(live) else live.new_zeros(1)
        return left[:, live].detach(), right[live].detach()

    def _pair(self, dtype):
        left, right = plain(self.left).to(dtype) * self.scale.to(dtype).square(), plain(self.right)
        if self.added_left is None:
            return left, right.to(dtype)
        added = plain(self.added_left).to(dtype), plain(self.added_right).to(dtype)
        return torch.cat([left, added[0]], dim=1), torch.cat([right.to(dtype), added[1]])

    def extra_repr(self):
        return f"{super().extra_repr()}, extra_rank={self.extra_rank}"
