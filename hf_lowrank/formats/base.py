"""What a format is: an `nn.Module` that stores and applies one linear map."""

from typing import ClassVar

import torch
from torch import nn

from ..checks import is_integer
from ..errors import RankError
from ..linalg import require_finite
from ..registry import Registry
from ._dense_view import DenseView


FORMATS = Registry("format")
register_format = FORMATS.register


class FactorizedLayer(nn.Module):
    """What factorized linears and convolutions have in common: a weight that is computed, and what is known of it.

    Class attributes:
        bias_name (`str`): the parameter that holds the bias.
    """

    bias_name: ClassVar[str]

    def __init__(self):
        super().__init__()
        # Whether the replaced layer stored its weight as (in, out); only `weight` depends on it.
        self.transposed = False
        self.relative_error = None
        # Whether the replaced layer had no bias, so that a checkpoint has to say there is one.
        self.added_bias = False

    @property
    def dense_shape(self):
        """Shape of the dense weight, as `dense_weight` gives it."""
        raise NotImplementedError

    def dense_weight(self):
        """The weight that this module applies, computed in float32 or wider, in the module's dtype."""
        raise NotImplementedError

    @property
    def weight(self):
        """The dense weight in the layout of the replaced layer, read-only, formed only if its values are used."""
        if torch.compiler.is_compiling():
            # The compiler cannot look into a lazy tensor, and drops a product that nobody uses.
            dense = self.dense_weight()
            return dense.T if self.transposed else dense
        return DenseView(self)

    @property
    def bias(self):
        """The bias `(out,)`, or `None`."""
        owner, _, leaf = self.bias_name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)


class FormatLinear(FactorizedLayer):
    """Base class of formats; a subclass is one file in `hf_lowrank/formats`, registered by `register_format`.

    `forward(x) == x @ dense_weight().T + bias` for every format. A format is described by `spec()`, a JSON dict from
    which `from_spec` rebuilds the module, empty, before any weight is loaded.

    Args:
        in_features (`int`): size of the last dimension of the input.
        out_features (`int`): size of the last dimension of the output.
        transposed (`bool`, defaults to `False`): whether the layer this one replaces stores its weight as
            `(in, out)`; only `weight` depends on it.

    Class attributes:
        bias_name (`str`): the parameter that holds the bias.
        lent (`tuple[str]`): the parameters that layers of a group have in common; the first layer alone stores them.
        output_rows (`tuple[str]`): the tensors with one row an output, by which outputs can be reordered; empty if a
            format has none.
        input_columns (`tuple[str]`): the matrices with one column an input; empty if a format has none.
        tensors (`int`): how many a layer stores at most, bias excluded.

    A subclass has a property `rank`. What else its constructor takes to tell shapes is its layout: keyword arguments
    of `cost` and `stored_bytes` too, and entries of `spec()`.
    """

    name: ClassVar[str]
    lent: ClassVar[tuple] = ()
    output_rows: ClassVar[tuple] = ()
    input_columns: ClassVar[tuple] = ()
    tensors: ClassVar[int] = 2

    def __init__(self, in_features, out_features, transposed=False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        # `(out, in)` of the layer this one replaces, which may be wider: channels can have been pruned since.
        self.replaced_shape = out_features, in_features

    @property
    def dense_shape(self):
        """`(out, in)`."""
        return (self.out_features, self.in_features)

    def spec(self):
        """The JSON description: `{"format": name, ...}`, with everything that shape and class do not tell."""
        return {"format": self.name, "rank": self.rank}

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        """An empty module with the shapes that `spec` describes; `kwargs` are `transposed`, `device`, `dtype`."""
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **kwargs)

    @classmethod
    def for_factors(cls, factors, bias, dtype, transposed):
        """A module for `factors` that holds their error and the bias already, and no factor yet."""
        (out_features, rank), in_features = factors.left.shape, factors.right.shape[1]
        options = {"device": "meta", "dtype": dtype, **factors.layout}
        layer = cls(in_features, out_features, rank, bias is not None, transposed, **options)
        if bias is not None:
            owner, _, leaf = cls.bias_name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, as_parameter(bias.to(factors.left.device), dtype))
        layer.relative_error = factors.relative_error
        return layer

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        """A filled module from what a method returned; this is where float64 is cast to `dtype`, once."""
        raise NotImplementedError

    @classmethod
    def cost(cls, out_features, in_features, rank):
        """Numbers stored for a weight of this shape at this rank, bias excluded."""
        raise NotImplementedError

    @classmethod
    def stored_bytes(cls, out_features, in_features, rank, dtype_size, **layout):
        """Bytes stored for a weight of this shape at this rank, bias excluded.

        Args:
            dtype_size (`int`): bytes of one number of the factors. A format that stores indices or masks beside them
                overrides this.
            layout: as of `cost`.
        """
        return cls.cost(out_features, in_features, rank, **layout) * dtype_size

    @classmethod
    def break_even(cls, out_features, in_features, layout=None):
        """The smallest rank whose cost is not below the dense weight's; `min(out, in) + 1` if there is none.

        `layout(out, in, rank)` gives what `cost` takes beside them.
        """
        low, high = 1, min(out_features, in_features) + 1
        while low < high:
            middle = (low + high) // 2
            options = {} if layout is None else layout(out_features, in_features, middle)
            if cls.cost(out_features, in_features, middle, **options) >= out_features * in_features:
                high = middle
            else:
                low = middle + 1
        return low

    def dense_weight(self):
        """The weight `(out, in)` that this module applies, computed in float32 or wider, in the module's dtype."""
        raise NotImplementedError

    def factors(self):
        """`(left, right)`, `(out, r)` and `(r, in)` in float64, whose product and `rest()` are the weight.

        Formats that hold two factors give these; any other weight is decomposed, at its numerical rank.
        """
        return exact_factors(self.dense_weight().detach().double(), torch.finfo(self.weight.dtype).eps)

    def rest(self):
        """What the weight has beside the product of its factors, `(out, in)`, float64, or `None`.

        Sparse, or anything else that adds to a matrix like one ([`Terms`]).
        """
        return None

    def exact_weight(self):
        """The weight `(out, in)` in float64, without the rounding to the module's dtype."""
        (left, right), rest = self.factors(), self.rest()
        return left @ right if rest is None else left @ right + rest

    def check_integers(self, name):
        """Refuse what a checkpoint cannot have meant: places of rows, columns or atoms that are none.

        Args:
            name (`str`): of this layer in its model, for the message.

        Raises:
            CheckpointError: the integers that this layer has read are not of its format.
        """

    def replacement(self):
        """`(weight, bias)` of an ordinary layer of the replaced shape: the weight in its layout, pruned channels zero.

        Zeros stand behind the channels that are left, in all layers that have the channels in common.
        """
        weight, (rows, columns) = self.dense_weight().detach(), self.replaced_shape
        missing = rows - self.out_features
        bias = self.bias
        if (rows, columns) != weight.shape:
            weight = nn.functional.pad(weight, (0, columns - self.in_features, 0, missing))
            if bias is not None and missing:
                bias = nn.Parameter(nn.functional.pad(bias.detach(), (0, missing)), requires_grad=bias.requires_grad)
        return (weight.T if self.transposed else weight).contiguous(), bias

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def exact_factors(weight, eps):
    """Two factors of `weight` `(out, in)`, float64, without the singular values that are rounding.

    Args:
        weight (`torch.Tensor`): float64.
        eps (`float`): relative precision of its entries; singular values up to `eps |W|_F` are left out.

    Returns:
        `(left, right)` with columns and rows of equal norm; of rank 1 at least.
    """
    require_finite(weight, "The weight")
    basis, values, rows = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, int((values > eps * values.norm()).sum()))
    root = values[:rank].sqrt()
    return basis[:, :rank] * root, root[:, None] * rows[:rank]


def is_packed(weight):
    """Whether a quantizer has packed `weight`: into a tensor of a class of its own, or into integers."""
    own = type(weight).dequantize is not torch.Tensor.dequantize
    # torchao's tensors say what they consist of; not all of them can be unpacked.
    return own or not weight.is_floating_point() or hasattr(weight, "tensor_data_names")


def plain(linear):
    """The weight `(out, in)` that a linear applies: its own, or what a packed one stands for.

    Where a packed weight has no way back, it is what the layer makes of the identity, in float32 if it is of integers.
    """
    weight = linear.weight
    if not is_packed(weight):
        return weight
    if type(weight).dequantize is not torch.Tensor.dequantize:
        return weight.dequantize()
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with torch.no_grad():
        rows = linear(torch.eye(linear.in_features, dtype=dtype, device=weight.device))
        return (rows if linear.bias is None else rows - linear.bias).T.contiguous()


def shape_of(linear):
    """`(out, in)` of a linear; packed integers have a shape of their own, so that there the layer is asked."""
    weight = linear.weight
    return tuple(weight.shape) if weight.is_floating_point() else (linear.out_features, linear.in_features)


def as_parameter(tensor, dtype):
    """A parameter of `dtype` in the memory layout it will have when it is loaded again."""
    # `contiguous` leaves odd strides of dimensions of size one, and kernels are chosen by strides.
    return nn.Parameter(tensor.to(dtype).clone(memory_format=torch.contiguous_format))


def check_rank(rank, out_features, in_features, name="this weight"):
    """Refuse anything but an integer rank in `1 .. min(out, in)`."""
    limit = min(out_features, in_features)
    if not is_integer(rank, 1) or rank > limit:
        raise RankError(
            f"rank={rank!r} for {name} must be an integer in 1..{limit} = min(out, in) of its "
            f"{out_features} x {in_features} weight; change it in `rank` or `rank_pattern`, or leave it to "
            "the allocator."
        )
