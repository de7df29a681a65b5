import dataclasses

import torch
from torch import nn
from torch.nn.functional import linear

from ..checks import is_integer
from ..errors import DAMAGED, CheckpointError, RankError
from ._lending import LendingLinear
from ._places import check_mask, check_rising
from ._row_supports import pack_supports, support_kind, unpack_mask
from .base import as_parameter, check_rank, plain, register_format


@register_format("dense_sparse")
class DenseSparseLinear(LendingLinear):
    r"""A small dense dictionary, and for every row of the weight a few of its atoms: a union of many thin spaces.

        z = x D^T,    y = z S^T + b,    W = S D,    every row of S with s numbers

    Each output is a combination of s atoms of its own choice out of a, where two factors of the cost would give all
    outputs the same ones. Which atoms a row has is stored as a packed bit mask or as integers, whichever is smaller,
    and not at all where it has all of them. With `blocks`, the outputs are cut into as many equal parts, each with a
    dictionary of its own, of `rank` atoms.

    `dictionary` is an ordinary `nn.Linear` child; the table `S` is put together for every pass, so that no time is
    saved over `a` dense columns. Several layers can have one dictionary in common, as those of
    [`SharedBasisLinear`] have a basis: K layers take a in + sum_k (out_k s) numbers, and their supports.

    Dictionary and values are trained; which atoms a row combines never changes.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): atoms of a dictionary, a, in `1 .. in`: beyond `out` where other layers have the same dictionary,
            and with `blocks` up to `out / blocks`. There are no overcomplete dictionaries.
        bias (`bool`, defaults to `True`): whether there is an `output_bias`.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        nonzeros (`int`, *optional*): atoms a row combines, s, in `1 .. rank`; all of them by default.
        blocks (`int`, defaults to 1): parts of the output, a divisor of `out`.
        borrows (`bool`, defaults to `False`): whether there is no `dictionary` here, and `borrow` will be called.

    Shapes:
        `dictionary.weight` `(blocks * a, in)`, in the lender only; `values` `(out, s)`, `output_bias` `(out,)`; and
        `mask` `(out, ceil(a / 8))` uint8, or `indices` `(out, s)` in uint8, int16 or int32, within the block, rising.

    Raises:
        RankError: `rank` is not an integer in range.
        CheckpointError: `nonzeros` or `blocks` is out of range.
        LowRankError: a borrower is used before it has a lender.

    Reference:
        The layout of DSFormer (2312.13211; reconstructed, with blocks and integers) and of CoSpaDi (2509.22075; with a
        mask). Differs: one format for both.
    """

    bias_name = "output_bias"
    input_columns = ("dictionary.weight",)
    lent = ("dictionary.weight",)
    tensors = 3

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        nonzeros=None,
        blocks=1,
        borrows=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        _check_number("blocks", blocks, 1 if borrows else out_features)
        if out_features % blocks:
            raise CheckpointError(
                f"`blocks`={blocks} of a dense_sparse layer must divide its {out_features} outputs. {DAMAGED}"
            )
        if blocks > 1:
            check_rank(rank, out_features // blocks, in_features)
        elif not is_integer(rank, 1, in_features):
            raise RankError(
                f"rank={rank!r} of a dictionary must be an integer in 1..{in_features}, the number of inputs; change "
                "it in `rank` or `rank_pattern`, or leave it to the allocator."
            )
        nonzeros = rank if nonzeros is None else nonzeros
        _check_number("nonzeros", nonzeros, rank)
        # A borrower has no dictionary to read it off.
        self.rank, self.blocks = rank, blocks
        options = {"device": device, "dtype": dtype}
        self.dictionary = None if borrows else nn.Linear(in_features, blocks * rank, bias=False, **options)
        self.values = nn.Parameter(torch.zeros(out_features, nonzeros, **options))
        supports = torch.arange(nonzeros, device=device).expand(out_features, -1)
        for name, tensor in _stored_supports(supports, rank).items():
            self.register_buffer(name, tensor)
        self.output_bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None

    @property
    def own_dtype(self):
        return self.values.dtype

    @property
    def nonzeros(self):
        """Atoms that a row combines."""
        return self.values.shape[1]

    @property
    def output_rows(self):
        """Rows of different blocks have different dictionaries, and cannot change places."""
        return ("values", "mask", "indices", "output_bias") if self.blocks == 1 else ()

    def spec(self):
        spec = super().spec()
        if self.nonzeros != self.rank:
            spec["nonzeros"] = self.nonzeros
        if self.blocks > 1:
            spec["blocks"] = self.blocks
        return spec

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        layout = {"nonzeros": spec.get("nonzeros"), "blocks": spec.get("blocks", 1), "borrows": "basis" in spec}
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **layout, **kwargs)

    def forward(self, x):
        z = self.projected(x)
        codes = self.codes().to(z.dtype)
        if self.blocks == 1:
            return linear(z, codes, self._bias_as(z))
        z, codes = z.unflatten(-1, (self.blocks, -1)), codes.unflatten(0, (self.blocks, -1))
        y = torch.einsum("...ba,bpa->...bp", z, codes).flatten(-2)
        return y if self.output_bias is None else y + self._bias_as(y)

    def _bias_as(self, y):
        return None if self.output_bias is None else self.output_bias.to(y.dtype)

    def codes(self):
        """The table S with its zeros, `(out, rank)`, each row for the dictionary of its block."""
        values = self.values
        empty = values.new_zeros(self.out_features, self.rank)
        if self.mask is not None:
            return empty.masked_scatter(unpack_mask(self.mask, self.rank), values)
        return values if self.indices is None else empty.scatter(1, self.indices.long(), values)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layout = dict(factors.layout)
        codes = _own_blocks(factors.left, layout.get("blocks", 1))
        # Without a layout, as many as the fullest row has.
        layout.setdefault("nonzeros", max(1, int((codes != 0).sum(1).max())))
        layer = cls.for_factors(dataclasses.replace(factors, layout=layout, left=codes), bias, dtype, transposed)
        # Stable, so that a row with fewer non-zeros is filled up with its first zeros.
        order = codes.abs().sort(dim=1, descending=True, stable=True).indices
        supports = order[:, : layer.nonzeros].sort(dim=1).values
        layer.dictionary.weight = as_parameter(factors.right, dtype)
        layer.values = as_parameter(codes.gather(1, supports), dtype)
        for name, tensor in _stored_supports(supports, layer.rank).items():
            setattr(layer, name, tensor)
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank, nonzeros=None, blocks=1):
        kind = support_kind(rank, rank if nonzeros is None else nonzeros)
        numbers = _numbers(out_features, in_features, rank, nonzeros, blocks)
        return numbers + (0 if kind is None else out_features * kind[2])

    @classmethod
    def stored_bytes(cls, out_features, in_features, rank, dtype_size, nonzeros=None, blocks=1):
        kind = support_kind(rank, rank if nonzeros is None else nonzeros)
        numbers = _numbers(out_features, in_features, rank, nonzeros, blocks)
        return numbers * dtype_size + (0 if kind is None else out_features * kind[2] * kind[1].itemsize)

    def check_integers(self, name):
        if self.mask is not None:
            check_mask(self.mask, self.rank, self.nonzeros, name)
        if self.indices is not None:
            check_rising(self.indices, self.rank, name)

    def dense_weight(self):
        dictionary = plain(self.basis).to(self.values.device)
        wide = torch.promote_types(dictionary.dtype, torch.float32)
        codes = self.codes().to(wide).unflatten(0, (self.blocks, -1))
        return (codes @ dictionary.to(wide).unflatten(0, (self.blocks, -1))).flatten(0, 1).to(dictionary.dtype)

    def factors(self):
        codes = self.codes().detach().double().unflatten(0, (self.blocks, -1))
        return torch.block_diag(*codes), plain(self.basis).detach().to(codes.device).double()

    def extra_repr(self):
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}, blocks={self.blocks}"


def _stored_supports(supports, atoms):
    """`{"mask": ..., "indices": ...}`, of which one at most is there, for the atoms `supports` `(out, s)` of rows."""
    stored = {"mask": None, "indices": None}
    kind = support_kind(atoms, supports.shape[1])
    if kind is not None:
        name, dtype, _ = kind
        stored[name] = pack_supports(supports, atoms) if name == "mask" else supports.to(dtype)
    return stored


def _own_blocks(left, blocks):
    """Of a block-diagonal `left` `(out, blocks * rank)` what is in the blocks, `(out, rank)`."""
    parts = left.unflatten(0, (blocks, -1)).unflatten(-1, (blocks, -1))
    return parts.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1)


def _numbers(out_features, in_features, rank, nonzeros, blocks):
    """Floating-point numbers of the table and the dictionaries."""
    return blocks * rank * in_features + out_features * (rank if nonzeros is None else nonzeros)


def _check_number(name, value, most):
    if not is_integer(value, 1, most):
        raise CheckpointError(f"`{name}`={value!r} of a dense_sparse layer must be an integer in 1..{most}. {DAMAGED}")
