import torch
from torch import nn

from ..checks import is_integer
from ..errors import RankError
from ._lending import LendingLinear
from .base import as_parameter, plain, register_format, shape_of


@register_format("shared_basis")
class SharedBasisLinear(LendingLinear):
    r"""Two linears in a row, of which several layers share the first.

        y_k = left_k(right(x_k)) = x_k R^T L_k^T + b_k,    W_k = L_k R,    k = 1 .. K

    K layers take r (in + sum_k out_k) numbers instead of r (K in + sum_k out_k). One layer, the lender, holds `right`
    as a child; the others hold only `left` and reach `right` through the lender. So the basis is one parameter under
    one name: counted once, stored once, trained by the gradients of all its layers, and whatever replaces it (an
    adapter, a quantized linear) serves them all. A layer that shares with none is an ordinary pair of factors.

    A basis on another device is used there: the input goes to it, r numbers a token come back. Copy, cast and save
    the model as a whole; a borrower copied by itself takes its lender along. Under FSDP all layers of a group belong
    into one wrapped unit, as with any tied parameter.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): in `1 .. in`; beyond `out` where the other layers of the group need it.
        bias (`bool`, defaults to `True`): whether `left` carries a bias.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        borrows (`bool`, defaults to `False`): whether there is no `right` here, and `borrow` will be called.

    Shapes:
        `right.weight` `(r, in)`, in the lender only; `left.weight` `(out, r)`, `left.bias` `(out,)`.

    Raises:
        RankError: `rank` is not an integer in range.
        LowRankError: a borrower is used before it has a lender.

    Reference:
        Basis Sharing (ICLR 2025, TUDa-HWAI/Basis_Sharing) shares between layers, Joint Rank-k (2402.16319) between
        linears with one input. Differs: one class for both, and a basis that has a single owner.
    """

    bias_name = "left.bias"
    output_rows = ("left.weight", "left.bias")
    input_columns = ("right.weight",)
    lent = ("right.weight",)

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        borrows=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        if not is_integer(rank, 1, in_features):
            raise RankError(
                f"rank={rank!r} of a shared basis must be an integer in 1..{in_features}, the number of inputs; "
                "change it in `rank` or `rank_pattern`, or leave it to the allocator."
            )
        self.right = None if borrows else nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def own_dtype(self):
        return self.left.weight.dtype

    @property
    def rank(self):
        """Number of columns of `left`, read off the weights."""
        return shape_of(self.left)[1]

    def forward(self, x):
        return self.left(self.projected(x))

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        return cls(in_features, out_features, spec.get("rank"), bias=bias, borrows="basis" in spec, **kwargs)

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
        left, right = plain(self.left), plain(self.basis)
        wide = torch.promote_types(left.dtype, torch.float32)
        return (left.to(wide) @ right.to(left.device, wide)).to(left.dtype)

    def factors(self):
        left, right = plain(self.left).detach(), plain(self.basis).detach()
        return left.double(), right.to(left.device).double()
