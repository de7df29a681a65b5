import torch
from torch import nn

from ..checks import is_integer
from ..errors import CheckpointError, LowRankError, RankError
from .base import FormatLinear, as_parameter, plain, register_format, shape_of


@register_format("shared_basis")
class SharedBasisLinear(FormatLinear):
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
        if not is_integer(rank, 1) or rank > in_features:
            raise RankError(
                f"rank={rank!r} of a shared basis must be an integer in 1..{in_features}, the number of inputs; "
                "change it in `rank` or `rank_pattern`, or leave it to the allocator."
            )
        self.right = None if borrows else nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        # In a tuple, where the parameters of the lender are not found a second time.
        self._lender = ()

    @property
    def lender(self):
        """The layer that holds the basis of this one; `None` where that is this layer itself."""
        return self._lender[0] if self._lender else None

    @property
    def basis(self):
        """The linear that this layer applies first, its own or its lender's."""
        layer = self.lender or self
        if layer.right is None:
            raise LowRankError(
                "This layer borrows its basis from another one, which it has not been given; load or copy the whole "
                "model, or call `borrow`."
            )
        return layer.right

    def borrow(self, lender):
        """Use the basis of `lender` from now on, and drop the own one.

        Args:
            lender ([`SharedBasisLinear`]): holds a basis of the same inputs and rank.

        Raises:
            CheckpointError: the two do not fit together.
        """
        found = None
        if isinstance(lender, SharedBasisLinear) and lender is not self and lender.right is not None:
            found = (lender.rank, lender.in_features, lender.left.weight.dtype)
        wanted = (self.rank, self.in_features, self.left.weight.dtype)
        if found != wanted:
            raise CheckpointError(
                f"A layer of (rank, inputs, dtype) {wanted} cannot borrow the basis of "
                f"{type(lender).__name__ if found is None else f'a layer of {found}'}; the lender holds a basis of "
                "its own and agrees in all three. The checkpoint may be damaged: download or save it again."
            )
        self.right = None
        self._lender = (lender,)

    @property
    def rank(self):
        """Number of columns of `left`, read off the weights."""
        return shape_of(self.left)[1]

    def forward(self, x):
        right = self.basis
        # An offloaded basis is on the meta device until its hook fetches it, and moves the input to it.
        there = x if right.weight.is_meta else x.to(right.weight.device)
        return self.left(right(there).to(x.device))

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

    def release(self, borrowers):
        """Hand the own basis on to the first of `borrowers`, and keep a copy that is nobody else's.

        Args:
            borrowers (`list[SharedBasisLinear]`): all layers that borrow from this one.
        """
        heir, *others = borrowers
        heir.right, heir._lender = self.right, ()
        for other in others:
            other._lender = (heir,)
        own = self.right.weight
        self.right = nn.Linear(self.in_features, self.rank, bias=False, device="meta")
        self.right.weight = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)

    def extra_repr(self):
        return f"{super().extra_repr()}, borrows={self.lender is not None}"
