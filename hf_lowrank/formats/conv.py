"""The convolution face of the format `low_rank`: two convolutions in a row."""

import math
from operator import attrgetter

import torch
from torch import nn

from .base import FactorizedLayer, as_parameter, check_rank


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LowRankConv(FactorizedLayer):
    r"""Two convolutions in a row: one with the kernel of the dense one to few channels, one of 1 x ... x 1 from these.

        y = left * (right * x) + b,    W.reshape(groups, out / groups, -1)[g] = L_g R_g

    `right` has stride, padding, padding mode and dilation of the dense convolution, so that `left`, which looks at one
    place, is exact for all of them. Each group of a grouped convolution has factors of its own, and both convolutions
    are grouped. A checkpoint calls this `low_rank`: what it is besides the rank, the model's own code says.

    Args:
        in_channels (`int`): channels of the input.
        out_channels (`int`): channels of the output.
        kernel_size (`tuple[int]`): of one to three dimensions.
        rank (`int`): of each group, in `1 .. min(out / groups, in / groups * prod(kernel_size))`.
        bias (`bool`, defaults to `True`): whether `left` carries a bias.
        stride, padding, dilation, groups, padding_mode: as of `torch.nn.Conv2d`.

    Shapes:
        `right.weight` `(groups * r, in / groups, *kernel_size)`, `left.weight` `(out, r, 1, ...)`, `left.bias`
        `(out,)`; r (out + in prod(kernel_size)) numbers and the bias.

    Raises:
        RankError: `rank` is not an integer in range.

    Reference:
        Winata et al., LRT, ICASSP 2020, and Greenformers, 2021, for the two steps. Differs: groups are kept.
    """

    name = "low_rank"
    bias_name = "left.bias"

    # What the code of models reads off the dense convolution.
    in_channels = property(attrgetter("right.in_channels"), doc="Channels of the input.")
    out_channels = property(attrgetter("left.out_channels"), doc="Channels of the output.")
    kernel_size = property(attrgetter("right.kernel_size"), doc="Places that one output looks at, by dimension.")
    stride = property(attrgetter("right.stride"), doc="Steps from one output to the next, by dimension.")
    padding = property(attrgetter("right.padding"), doc="What is added at the edges, by dimension, or its name.")
    padding_mode = property(attrgetter("right.padding_mode"), doc="What it is filled with.")
    dilation = property(attrgetter("right.dilation"), doc="Distances inside the kernel, by dimension.")
    groups = property(attrgetter("right.groups"), doc="In how many parts channels fall, which do not see each other.")

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        rank,
        bias=True,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_rank(rank, out_channels // groups, in_channels // groups * math.prod(kernel_size))
        conv, options = CONVOLUTIONS[len(kernel_size)], {"device": device, "dtype": dtype}
        self.right = conv(
            in_channels, groups * rank, kernel_size, stride, padding, dilation, groups, False, padding_mode, **options
        )
        self.left = conv(groups * rank, out_channels, 1, groups=groups, bias=bias, **options)

    @classmethod
    def like(cls, dense, rank, bias=None, device="meta", dtype=None):
        """A layer for the place of `dense`, a convolution, without values; `bias` is whether, by default as there."""
        return cls(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            rank,
            bias=dense.bias is not None if bias is None else bias,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            groups=dense.groups,
            padding_mode=dense.padding_mode,
            device=device,
            dtype=dtype or dense.weight.dtype,
        )

    def empty_dense(self):
        """A dense convolution of the same geometry, with bias or without, on the meta device."""
        return type(self.right)(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
            dtype=self.right.weight.dtype,
        )

    @staticmethod
    def tensors(factors, kernel_size, dtype):
        """`{"left.weight": ..., "right.weight": ...}` of one [`Factors`] a group."""
        right = torch.cat([each.right for each in factors]).unflatten(1, (-1, *kernel_size))
        left = torch.cat([each.left for each in factors])
        left = left.reshape(*left.shape, *[1] * len(kernel_size))
        return {"left.weight": as_parameter(left, dtype), "right.weight": as_parameter(right, dtype)}

    @property
    def rank(self):
        """Channels between the two steps, of one group, read off the weights."""
        return self.right.weight.shape[0] // self.groups

    @property
    def out_features(self):
        """Rows of the matrix of one group."""
        return self.out_channels // self.groups

    @property
    def in_features(self):
        """Columns of the matrix of one group: channels times places of the kernel."""
        return self.right.weight[0].numel()

    @property
    def dense_shape(self):
        """`(out, in / groups, *kernel_size)`."""
        return (self.out_channels, *self.right.weight.shape[1:])

    def spec(self):
        """The JSON description: `{"format": "low_rank", "rank": r}`."""
        return {"format": self.name, "rank": self.rank}

    def forward(self, x):
        return self.left(self.right(x))

    def pairs(self):
        """`(left, right)` of each group, `(out / groups, r)` and `(r, in / groups * prod(kernel_size))`."""
        left = self.left.weight.flatten(1).unflatten(0, (self.groups, -1))
        right = self.right.weight.flatten(1).unflatten(0, (self.groups, -1))
        return list(zip(left, right, strict=True))

    def dense_weight(self):
        """The kernel `(out, in / groups, *kernel_size)` that both steps together apply."""
        wide = torch.promote_types(self.left.weight.dtype, torch.float32)
        product = torch.cat([left.to(wide) @ right.to(wide) for left, right in self.pairs()])
        return product.reshape(self.dense_shape).to(self.left.weight.dtype)

    def extra_repr(self):
        return f"rank={self.rank}, groups={self.groups}"
