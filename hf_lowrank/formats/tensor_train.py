import math

import torch
from torch import nn

from ..checks import is_integer
from ..errors import DAMAGED, CheckpointError
from ..linalg import centred, full_bonds, tensor_train, train_matrix
from ._train_product import apply_train, routes
from .base import FormatLinear, as_parameter, check_rank, register_format


MAX_CORES = 8


@register_format("tensor_train")
class TensorTrainLinear(FormatLinear):
    r"""A chain of small cores, one a pair of modes of the rows and the columns: a tensor train, or MPO.

        W[i_1 .. i_n, j_1 .. j_n] = T_1[i_1, j_1] T_2[i_2, j_2] .. T_n[i_n, j_n],    y = x W^T + b

    Sizes that are no product of the modes are padded with zeros. Two factors are the train of the modes `(out, 1)` and
    `(1, in)`, which is what a layer without shapes is.

    The input goes through the chain from either end, with some neighbouring cores joined first, or through the whole
    matrix: whichever takes the fewest multiplications for the tokens at hand ([`routes`]). An exported program always
    does what is best for many.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): of a train of two factors, in `1 .. min(out, in)`; with `bonds`, it is the largest of these.
        bias (`bool`, defaults to `True`): whether there is an `output_bias`.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        out_shape (`list[int]`, *optional*): i_1 .. i_n, 2 to 8 modes whose product is `out` or padded, below twice
            that.
        in_shape (`list[int]`, *optional*): j_1 .. j_n, likewise.
        bonds (`list[int]`, *optional*): d_1 .. d_{n-1}, each at least 1 and none larger than its neighbour allows:
            `d_k <= d_{k-1} i_k j_k` and `d_{k-1} <= i_k j_k d_k`.

    Shapes:
        `core_0` .. `core_<n-1>`, each as the matrix `(d_{k-1} i_k, j_k d_k)`; `output_bias` `(out,)`.
        sum_k d_{k-1} i_k j_k d_k numbers.

    Raises:
        RankError: `rank` of two factors is not an integer in range.
        CheckpointError: shapes or bonds that do not fit.

    Reference:
        MPOP, ACL 2021; Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 2011. Differs: order of the
        products chosen by their cost.
    """

    bias_name = "output_bias"
    tensors = MAX_CORES

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        out_shape=None,
        in_shape=None,
        bonds=None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        if out_shape is None and in_shape is None and bonds is None:
            check_rank(rank, out_features, in_features)
            out_shape, in_shape, bonds = _of_factors(out_features, in_features, rank)
        problem = misfit(out_features, in_features, out_shape, in_shape, bonds)
        if problem is not None:
            raise CheckpointError(f"{problem} {DAMAGED}")
        self.out_shape, self.in_shape = tuple(out_shape), tuple(in_shape)
        self._set_bonds(bonds)
        options = {"device": device, "dtype": dtype}
        for k, (d, i, j, e) in enumerate(self._core_shapes()):
            self.register_parameter(f"core_{k}", nn.Parameter(torch.zeros(d * i, j * e, **options)))
        self.output_bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None

    @property
    def rank(self):
        """The largest bond; of two factors, their rank."""
        return max(self.bonds)

    @property
    def cores(self):
        """The cores `(d_{k-1}, i_k, j_k, d_k)`, views of what is stored."""
        return [getattr(self, f"core_{k}").view(shape) for k, shape in enumerate(self._core_shapes())]

    @property
    def central(self):
        """Which core holds the most numbers; the others are the auxiliary ones."""
        sizes = [math.prod(shape) for shape in self._core_shapes()]
        return sizes.index(max(sizes))

    def auxiliary(self):
        """The parameters of all cores but the central one."""
        return [getattr(self, f"core_{k}") for k in range(len(self.out_shape)) if k != self.central]

    @property
    def output_rows(self):
        """Only in two factors do rows belong to outputs."""
        return ("core_0", "output_bias") if self._is_of_factors else ()

    @property
    def input_columns(self):
        """As for `output_rows`."""
        return ("core_1",) if self._is_of_factors else ()

    def spec(self):
        spec = super().spec()
        if not self._is_of_factors:
            spec.update(out_shape=list(self.out_shape), in_shape=list(self.in_shape), bonds=list(self.bonds))
        return spec

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        layout = {key: spec.get(key) for key in ("out_shape", "in_shape", "bonds")}
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **layout, **kwargs)

    def forward(self, x):
        y = apply_train(x, self.cores, self._routes, self.out_features)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        layer = cls.for_factors(factors, bias, dtype, transposed)
        if factors.cores:
            cores = factors.cores
        elif layer._is_of_factors:
            cores = [factors.left, factors.right]
        else:
            cores, _ = tensor_train(factors.product(), layer.out_shape, layer.in_shape, layer.bonds)
            cores = centred(cores, layer.central)
        layer.set_cores(cores, layer.bonds, dtype)
        return layer

    def set_cores(self, cores, bonds, dtype=None):
        """Replace all cores, of other `bonds` perhaps, in the layer's dtype unless another is given."""
        dtype = self.core_0.dtype if dtype is None else dtype
        trainable = [getattr(self, f"core_{k}").requires_grad for k in range(len(cores))]
        self._set_bonds(bonds)
        for k, (core, (d, i, j, e)) in enumerate(zip(cores, self._core_shapes(), strict=True)):
            parameter = as_parameter(core.detach().reshape(d * i, j * e), dtype)
            setattr(self, f"core_{k}", parameter.requires_grad_(trainable[k]))

    @classmethod
    def cost(cls, out_features, in_features, rank, out_shape=None, in_shape=None, bonds=None):
        if bonds is None:
            out_shape, in_shape, bonds = _of_factors(out_features, in_features, rank)
        return sum(math.prod(shape) for shape in _core_shapes(out_shape, in_shape, bonds))

    def dense_weight(self):
        wide = torch.promote_types(self.core_0.dtype, torch.float32)
        return self._matrix([core.to(wide) for core in self.cores]).to(self.core_0.dtype)

    def exact_weight(self):
        return self._matrix([core.detach().double() for core in self.cores])

    def factors(self):
        if self._is_of_factors:
            return self.core_0.detach().double(), self.core_1.detach().double()
        return super().factors()

    def _set_bonds(self, bonds):
        self.bonds = tuple(bonds)
        # Found once: a compiler would trace the search.
        self._routes = routes(self.out_features, self.in_features, self.out_shape, self.in_shape, self.bonds)

    def _matrix(self, cores):
        return train_matrix(cores)[: self.out_features, : self.in_features]

    def _core_shapes(self):
        return _core_shapes(self.out_shape, self.in_shape, self.bonds)

    @property
    def _is_of_factors(self):
        return (self.out_shape, self.in_shape) == ((self.out_features, 1), (1, self.in_features))

    def extra_repr(self):
        shapes = f"out_shape={self.out_shape}, in_shape={self.in_shape}, bonds={self.bonds}"
        return f"{super().extra_repr()}, {shapes}"


def _of_factors(out_features, in_features, rank):
    return (out_features, 1), (1, in_features), (rank,)


def _core_shapes(out_shape, in_shape, bonds):
    return list(zip((1, *bonds), out_shape, in_shape, (*bonds, 1), strict=True))


def misfit(out_features, in_features, out_shape, in_shape, bonds):
    """What keeps modes and bonds from being a train of an `out x in` weight, in words; `None` if nothing does."""
    for name, shape, size in (("out_shape", out_shape, out_features), ("in_shape", in_shape, in_features)):
        if not _are_integers(shape) or not 2 <= len(shape) <= MAX_CORES or not size <= math.prod(shape) < 2 * size:
            return (
                f"`{name}`={shape!r} of a train for a {out_features} x {in_features} weight must be 2 to {MAX_CORES} "
                f"integers whose product is {size} or padded, below {2 * size}."
            )
    if len(in_shape) != len(out_shape) or not _are_integers(bonds) or len(bonds) != len(out_shape) - 1:
        return (
            f"`out_shape`={out_shape!r}, `in_shape`={in_shape!r} and bonds {bonds!r} of a train must have one length, "
            "the bonds one less."
        )
    for d, i, j, e in _core_shapes(out_shape, in_shape, bonds):
        if e > d * i * j or d > i * j * e:
            return (
                f"Bonds {list(bonds)} of a train are more than a core of {i} x {j} between {d} and {e} can fill; they "
                f"are at most {list(full_bonds(out_shape, in_shape))}."
            )
    return None


def _are_integers(values):
    return isinstance(values, (list, tuple)) and all(is_integer(value, 1) for value in values)
