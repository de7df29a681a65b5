import dataclasses

import torch
from torch import nn

from ..checks import is_integer
from ..errors import DAMAGED, CheckpointError
from ._places import check_order
from .base import FormatLinear, as_parameter, check_rank, plain, register_format, shape_of


@register_format("hybrid_rows")
class HybridRowsLinear(FormatLinear):
    r"""Some rows of the weight as they are, and all others of a low rank, of one as a rule.

        y = cat(x W_u^T, x R^T L^T)[order] + b,    W[U] = W_u,    W[rest] = L R

    With j free rows and a rank of k for the rest, the weight has rank j + k, where two factors of the cost have about
    half of that. Outputs are put in order by a gather, for which the layer stores `out` integers; a layer that is
    trained from scratch has its free rows first, and needs neither (`rows_first`).

    All three tables are ordinary `nn.Linear` children.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): j + k, in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether there is an `output_bias`.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        lower_rank (`int`, *optional*): k, in `1 .. rank`; all of the rank by default, which leaves two plain factors.
        rows_first (`bool`, defaults to `False`): the free rows come first, and there is no `order`.

    Shapes:
        `rows.weight` `(j, in)`, `right.weight` `(k, in)`, `left.weight` `(out - j, k)`, `order` `(out,)` int32,
        `output_bias` `(out,)`; j in + k (out - j + in) numbers and the order. Without free rows no `rows` nor `order`.

    Raises:
        RankError: `rank` is not an integer in range.
        CheckpointError: `lower_rank` or `rows_first` is not as above.

    Reference:
        HMF of Thakker et al., "Rank and run-time aware compression of NLP applications", 2010.03193 (as hybrid matrix
        decomposition in 1906.04886), of which the abstract is known. Differs: which rows are free is stored, and the
        others may have any rank.
    """

    bias_name = "output_bias"
    input_columns = ("rows.weight", "right.weight")
    tensors = 4

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        lower_rank=None,
        rows_first=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        lower_rank = rank if lower_rank is None else lower_rank
        _check_layout(lower_rank, rows_first, rank)
        free, options = rank - lower_rank, {"bias": False, "device": device, "dtype": dtype}
        self.rows = nn.Linear(in_features, free, **options) if free else None
        self.right = nn.Linear(in_features, lower_rank, **options)
        self.left = nn.Linear(lower_rank, out_features - free, **options)
        ordered = free and not rows_first
        self.register_buffer(
            "order", torch.arange(out_features, dtype=torch.int32, device=device) if ordered else None
        )
        self.output_bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def lower_rank(self):
        """Rank of the rows that are not free."""
        return shape_of(self.right)[0]

    @property
    def rank(self):
        """Number of free rows and rank of the others, together."""
        return self.lower_rank + (0 if self.rows is None else shape_of(self.rows)[0])

    @property
    def rows_first(self):
        """Whether outputs are left in the order in which they are computed."""
        return self.order is None

    @property
    def output_rows(self):
        """The order has one entry an output; free rows that come first have no place to note another."""
        if self.rows is None:
            return ("left.weight", "output_bias")
        return () if self.order is None else ("order", "output_bias")

    def spec(self):
        spec = super().spec()
        if self.rows is None:
            return spec
        spec["lower_rank"] = self.lower_rank
        return {**spec, "rows_first": True} if self.rows_first else spec

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        layout = {"lower_rank": spec.get("lower_rank"), "rows_first": spec.get("rows_first", False)}
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **layout, **kwargs)

    def forward(self, x):
        y = self.left(self.right(x))
        if self.rows is not None:
            y = torch.cat([self.rows(x), y], dim=-1)
        if self.order is not None:
            # gather takes the order row by row and is several times faster than indexing the last dimension.
            y = y.gather(-1, self.order.long().expand_as(y))
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        free, layout = _free_columns(factors), {}
        if len(free):
            layout = {"lower_rank": factors.left.shape[1] - len(free)}
            layout["rows_first"] = factors.layout.get("rows_first", False)
        layer = cls.for_factors(dataclasses.replace(factors, layout=layout), bias, dtype, transposed)
        # The row in which each of these columns has its one.
        rows = factors.left[:, free].abs().argmax(dim=0)
        others = torch.ones(layer.out_features, dtype=torch.bool, device=rows.device).index_fill(0, rows, False)
        shared = torch.ones(factors.left.shape[1], dtype=torch.bool, device=rows.device).index_fill(0, free, False)
        if layer.rows is not None:
            layer.rows.weight = as_parameter(factors.left[rows] @ factors.right, dtype)
        layer.left.weight = as_parameter(factors.left[others][:, shared], dtype)
        layer.right.weight = as_parameter(factors.right[shared], dtype)
        if layer.order is not None:
            layer.order = torch.cat([rows, others.nonzero().flatten()]).argsort().int()
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank, lower_rank=None, rows_first=False):
        free = 0 if lower_rank is None else rank - lower_rank
        return _numbers(out_features, in_features, rank, free) + (out_features if free and not rows_first else 0)

    @classmethod
    def stored_bytes(cls, out_features, in_features, rank, dtype_size, lower_rank=None, rows_first=False):
        free = 0 if lower_rank is None else rank - lower_rank
        order = out_features * torch.int32.itemsize if free and not rows_first else 0
        return _numbers(out_features, in_features, rank, free) * dtype_size + order

    def check_integers(self, name):
        if self.order is not None:
            check_order(self.order, name)

    def dense_weight(self):
        left, right = plain(self.left), plain(self.right)
        wide = torch.promote_types(left.dtype, torch.float32)
        weight = left.to(wide) @ right.to(wide)
        if self.rows is not None:
            weight = torch.cat([plain(self.rows).to(wide), weight])
        return (weight if self.order is None else weight[self.order.long()]).to(left.dtype)

    def factors(self):
        left, right = plain(self.left).detach().double(), plain(self.right).detach().double()
        if self.rows is None:
            return left, right
        rows = plain(self.rows).detach().double()
        left = torch.block_diag(torch.eye(len(rows), dtype=left.dtype, device=left.device), left)
        return (left if self.order is None else left[self.order.long()]), torch.cat([rows, right])

    def extra_repr(self):
        return f"{super().extra_repr()}, lower_rank={self.lower_rank}"


def _free_columns(factors):
    """The columns of `left` that one row each has to itself, by which that row is free; as many as the layout says.

    Without a layout, all that can be: an update that is appended to the factors leaves these columns as they are.
    """
    left, lower_rank = factors.left, factors.layout.get("lower_rank")
    if lower_rank is not None:
        return torch.arange(left.shape[1] - lower_rank, device=left.device)
    single = (left != 0).sum(0) == 1
    rows = left.abs().argmax(dim=0)
    # Of several columns with one row, the first.
    first = torch.ones_like(single)
    for column in range(1, left.shape[1]):
        first[column] = not (single[:column] & (rows[:column] == rows[column])).any()
    free = (single & first).nonzero().flatten()
    # The others need a rank, whatever it is of.
    return free[: left.shape[1] - 1]


def _numbers(out_features, in_features, rank, free):
    """Floating-point numbers of the three tables."""
    return free * in_features + (rank - free) * (out_features - free + in_features)


def _check_layout(lower_rank, rows_first, rank):
    if not is_integer(lower_rank, 1, rank):
        raise CheckpointError(
            f"`lower_rank`={lower_rank!r} of a hybrid_rows layer must be an integer in 1..{rank}, its rank. {DAMAGED}"
        )
    if not isinstance(rows_first, bool):
        raise CheckpointError(f"`rows_first`={rows_first!r} of a hybrid_rows layer must be true or false. {DAMAGED}")
