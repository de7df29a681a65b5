import torch
from torch import nn

from ..errors import DAMAGED, CheckpointError
from ..linalg import row_basis
from ._places import check_order
from .base import FormatLinear, as_parameter, check_rank, plain, register_format, shape_of


@register_format("pivoted")
class PivotedLinear(FormatLinear):
    r"""Some rows of the weight, and the others as combinations of them: the same matrix in fewer numbers.

        z = x B^T,    y = cat(z, z C^T)[order] + b,    W[P] = B,    W[R] = C B

    A matrix of rank r is r of its own rows P and coefficients for the rest R: `r (out + in - r)` numbers where two
    factors take `r (out + in)`, and fewer than the dense weight at every rank below full. Pivots are chosen so that
    no coefficient exceeds 1.05, which keeps half precision as good as two factors. The order costs one gather of the
    output and `out` integers; a layer whose outputs may come pivots first has neither, see [`fold_order`].

    Both tables are ordinary `nn.Linear` children, and train like factors; the choice of rows is fixed.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether there is an `output_bias`.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        pivots_first (`bool`, defaults to `False`): outputs come as `cat(z, z C^T)`, and there is no `order`.

    Shapes:
        `basis.weight` `(r, in)`, `coefficients.weight` `(out - r, r)`, `order` `(out,)` int32, `output_bias` `(out,)`.
        At rank `out` there are no coefficients.

    Raises:
        RankError: `rank` is not an integer in range.

    Reference:
        PIFA (biomedical-cybernetics/pivoting-factorization, ICML 2025). Differs: rows are chosen by maximum volume
        rather than by pivoted QR alone, and outputs are put in order by a gather, which compiles and exports.
    """

    bias_name = "output_bias"
    output_rows = ("order", "output_bias")
    input_columns = ("basis.weight",)
    tensors = 3

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        pivots_first=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        self.basis = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.coefficients = None
        if rank < out_features:
            self.coefficients = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        order = None if pivots_first else torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("order", order)
        self.output_bias = None
        if bias:
            self.output_bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @property
    def rank(self):
        """Number of rows of `basis`, read off the weights."""
        return shape_of(self.basis)[0]

    @property
    def pivots_first(self):
        """Whether outputs are left in the order in which they are computed."""
        return self.order is None

    def spec(self):
        return {**super().spec(), "pivots_first": True} if self.pivots_first else super().spec()

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        pivots_first = spec.get("pivots_first", False)
        if not isinstance(pivots_first, bool):
            raise CheckpointError(
                f"`pivots_first`={pivots_first!r} of a pivoted layer must be true or false. {DAMAGED}"
            )
        return cls(in_features, out_features, spec.get("rank"), bias=bias, pivots_first=pivots_first, **kwargs)

    def forward(self, x):
        y = self.basis(x)
        if self.coefficients is not None:
            y = torch.cat([y, self.coefficients(y)], dim=-1)
        if self.order is not None:
            # gather takes the order row by row and is several times faster than indexing the last dimension.
            y = y.gather(-1, self.order.long().expand_as(y))
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layer = cls.for_factors(factors, bias, dtype, transposed)
        pivots, others, coefficients = row_basis(factors.left)
        layer.basis.weight = as_parameter(factors.left[pivots] @ factors.right, dtype)
        if layer.coefficients is not None:
            layer.coefficients.weight = as_parameter(coefficients, dtype)
        layer.order = torch.cat([pivots, others]).argsort().int()
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank):
        return rank * (out_features + in_features - rank) + out_features

    @classmethod
    def stored_bytes(cls, out_features, in_features, rank, dtype_size):
        order = out_features * torch.int32.itemsize
        return (cls.cost(out_features, in_features, rank) - out_features) * dtype_size + order

    def check_integers(self, name):
        if self.order is not None:
            check_order(self.order, name)

    def dense_weight(self):
        basis = plain(self.basis)
        rows = basis.to(torch.promote_types(basis.dtype, torch.float32))
        if self.coefficients is not None:
            rows = torch.cat([rows, plain(self.coefficients).to(rows.dtype) @ rows])
        return (rows if self.order is None else rows[self.order.long()]).to(basis.dtype)

    def factors(self):
        basis = plain(self.basis).detach().double()
        left = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        if self.coefficients is not None:
            left = torch.cat([left, plain(self.coefficients).detach().double()])
        return (left if self.order is None else left[self.order.long()]), basis
