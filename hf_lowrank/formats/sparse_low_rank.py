import dataclasses

import torch
from torch import nn
from torch.nn.functional import linear

from ..checks import is_integer, is_number
from ..errors import DAMAGED, CheckpointError, ConfigError
from ..linalg import flat_places, sparse_matrix
from ._places import check_rising
from ._sparse_product import SparseLowRankProduct, merged
from .base import FormatLinear, as_parameter, check_rank, register_format


@register_format("sparse_low_rank")
class SparseLowRankLinear(FormatLinear):
    r"""Two thin factors and a few single entries: what low rank cannot say, the entries can.

        y = x W^T + b,    W = c L R + S,    S.flat[indices] = values, zero elsewhere

    Which entries there are never changes; their values are trained as the factors are. Between a forward and a
    backward pass stand the input and the parts, never `W` ([`SparseLowRankProduct`]); while a layer runs, `W` exists,
    so that it is no faster than a dense one. Without entries (`nonzeros=0`) it is a pair of factors with a scale.

    Entries are counted with their places: 2 numbers each.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether there is an `output_bias`.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        nonzeros (`int`, defaults to 0): entries of `S`, in `0 .. out * in`.
        scaling (`float`, defaults to 1.0): c, above 0, which sets how fast the factors train beside the entries.

    Shapes:
        `left` `(out, r)`, `right` `(r, in)`, `values` `(n,)`, `indices` `(n,)` int32, rising, `output_bias` `(out,)`.

    Raises:
        RankError: `rank` is not an integer in range.
        CheckpointError: `nonzeros` or `scaling` is out of range.
        ConfigError: a weight of 2^31 entries or more, which int32 cannot number.

    Reference:
        Han et al., SLTrain, NeurIPS 2024, https://arxiv.org/abs/2406.02214. Differs: indices of half the size.
    """

    bias_name = "output_bias"
    tensors = 4

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        nonzeros=0,
        scaling=1.0,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        _check_layout(nonzeros, scaling, out_features, in_features)
        self.scaling = scaling
        options = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.zeros(out_features, rank, **options))
        self.right = nn.Parameter(torch.zeros(rank, in_features, **options))
        self.values = nn.Parameter(torch.zeros(nonzeros, **options)) if nonzeros else None
        places = torch.arange(nonzeros, dtype=torch.int32, device=device) if nonzeros else None
        self.register_buffer("indices", places)
        self.output_bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None

    @property
    def rank(self):
        """Number of rows of `right`, read off the weights."""
        return self.right.shape[0]

    @property
    def nonzeros(self):
        """Number of single entries."""
        return 0 if self.values is None else len(self.values)

    @property
    def output_rows(self):
        """Entries carry their row in their index, which a reordering would have to rewrite."""
        return ("left", "output_bias") if self.values is None else ()

    @property
    def input_columns(self):
        """As for `output_rows`."""
        return ("right",) if self.values is None else ()

    def spec(self):
        spec = super().spec()
        if self.values is not None:
            spec["nonzeros"] = self.nonzeros
        if self.scaling != 1.0:
            spec["scaling"] = self.scaling
        return spec

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        layout = {"nonzeros": spec.get("nonzeros", 0), "scaling": spec.get("scaling", 1.0)}
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **layout, **kwargs)

    def forward(self, x):
        left, right, values = self.left, self.right, self.values
        if torch.is_autocast_enabled(x.device.type):
            # Here, where autograd sees it: the backward pass does not know of autocast.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, left, right = x.to(dtype), left.to(dtype), right.to(dtype)
            values = None if values is None else values.to(dtype)
        if values is None:
            y = linear(linear(x, right), left) * self.scaling
        else:
            y = SparseLowRankProduct.apply(x, left, right, values, self.indices, self.scaling)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        nonzeros = 0 if factors.rest is None else factors.rest.values().numel()
        factors = dataclasses.replace(factors, layout={**factors.layout, "nonzeros": nonzeros})
        layer = cls.for_factors(factors, bias, dtype, transposed)
        layer.left = as_parameter(factors.left / layer.scaling, dtype)
        layer.right = as_parameter(factors.right, dtype)
        if nonzeros:
            layer.values = as_parameter(factors.rest.values(), dtype)
            layer.indices = flat_places(factors.rest).int()
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank, nonzeros=0, scaling=1.0):
        return rank * (out_features + in_features) + 2 * nonzeros

    @classmethod
    def stored_bytes(cls, out_features, in_features, rank, dtype_size, nonzeros=0, scaling=1.0):
        numbers = rank * (out_features + in_features) + nonzeros
        return numbers * dtype_size + nonzeros * torch.int32.itemsize

    def check_integers(self, name):
        if self.indices is not None:
            check_rising(self.indices, self.out_features * self.in_features, name)

    def dense_weight(self):
        left, right = self.left, self.right
        if self.values is not None:
            return merged(left, right, self.values, self.indices, self.scaling).to(left.dtype)
        wide = torch.promote_types(left.dtype, torch.float32)
        return (left.to(wide) @ right.to(wide) * self.scaling).to(left.dtype)

    def factors(self):
        return self.left.detach().double() * self.scaling, self.right.detach().double()

    def rest(self):
        if self.values is None:
            return None
        values = self.values.detach().double()
        return sparse_matrix(self.indices.long(), values, (self.out_features, self.in_features))

    def extra_repr(self):
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}, scaling={self.scaling:g}"


def _check_layout(nonzeros, scaling, out_features, in_features):
    size = out_features * in_features
    if not is_integer(nonzeros, 0, size):
        raise CheckpointError(
            f"`nonzeros`={nonzeros!r} of a sparse_low_rank layer must be an integer in 0..{size}, the entries of its "
            f"{out_features} x {in_features} weight. {DAMAGED}"
        )
    if not is_number(scaling) or scaling <= 0:
        raise CheckpointError(f"`scaling`={scaling!r} of a sparse_low_rank layer must be a number above 0. {DAMAGED}")
    if nonzeros and size > torch.iinfo(torch.int32).max:
        raise ConfigError(
            f"A weight of {out_features} x {in_features} has more entries than int32 indices can number; leave it out "
            "with `exclude_modules`."
        )
