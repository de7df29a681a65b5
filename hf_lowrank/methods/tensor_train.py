from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_integer, is_integer
from ..errors import ConfigError
from ..formats import TensorTrainLinear, misfit
from ..linalg import balanced_modes, centred, full_bonds, tensor_train, train_matrix
from ._measured import Measured
from .base import Factors, register_method


@register_method("tensor_train")
@dataclass(frozen=True)
class TensorTrain(Measured):
    r"""The weight as a chain of small tensors, a matrix product operator; needs no data.

        min |W - T_1 T_2 .. T_n|_F^2,    rows as (i_1 .. i_n), columns as (j_1 .. j_n),    T_k (d_{k-1}, i_k, j_k, d_k)

    by singular value decompositions from one end to the other, of which each is exact; their squared errors add up,
    and the whole is within a factor of sqrt(n - 1) of the best error at these bonds. Afterwards all cores are
    orthogonal but the largest, which has the norm of the weight. The rank r of a layer bounds its bonds, which are all
    full where it is `min(out, in)`:

        d_k = min(r, full_k),    full_k = min(prod_{l <= k} i_l j_l, prod_{l > k} i_l j_l)

    At full bonds the central core alone has as many numbers as the weight: only truncation compresses, and of the
    weights that were measured (docs/formats-map.md) the error is above that of two factors of the same size. What the
    chain offers is light fine-tuning, of all cores but the central one: `train_only(model, "auxiliary")`.

    Args:
        cores (`int`, defaults to 5): n, from 2 to 8, where no shapes are given.
        out_shape (`list[int]` or `dict`, *optional*): i_1 .. i_n; or such lists by the number of outputs, for a model
            with weights of several sizes, `{768: [3, 4, 4, 4, 4]}`. By default, and for other sizes, balanced factors,
            with the largest in the middle, of the size or of the next one that has good factors.
        in_shape (`list[int]` or `dict`, *optional*): j_1 .. j_n, likewise.
        bond_dims (`list[int]`, *optional*): the most that each bond may be, for every layer.
        max_bond (`int`, *optional*): the most that any bond may be, at least 1.

    Shapes:
        weight `(out, in)`, cores `(d_{k-1}, i_k, j_k, d_k)`. Computed in float64, on some copies of the whole weight.

    Raises:
        ConfigError: an option out of range, or shapes that do not fit a weight.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        MPOP, ACL 2021, with its five cores: 768 x 3072 is `[3, 4, 4, 4, 4]` by `[4, 4, 8, 6, 4]`. Differs: modes are
        found where none are given; bonds come from a budget.
    """

    format: ClassVar[str] = TensorTrainLinear.name
    only_format: ClassVar[bool] = True
    thin: ClassVar[bool] = False
    cores: int = 5
    out_shape: object = None
    in_shape: object = None
    bond_dims: object = None
    max_bond: int | None = None

    def __post_init__(self):
        check_integer("cores", self.cores, 2, self.name)
        if self.cores > TensorTrainLinear.tensors:
            raise ConfigError(f"`cores`={self.cores} of tensor_train must be at most {TensorTrainLinear.tensors}.")
        for name in ("out_shape", "in_shape"):
            object.__setattr__(self, name, _checked_shapes(name, getattr(self, name)))
        if self.max_bond is not None:
            check_integer("max_bond", self.max_bond, 1, self.name)
        if self.bond_dims is not None:
            if self.max_bond is not None:
                raise ConfigError("Give `bond_dims` or `max_bond` of tensor_train, not both.")
            object.__setattr__(self, "bond_dims", _checked_list("bond_dims", self.bond_dims))

    def layout(self, out_features, in_features, rank):
        out_shape, in_shape = _given(self.out_shape, out_features), _given(self.in_shape, in_features)
        count = next((len(shape) for shape in (out_shape, in_shape) if shape is not None), self.cores)
        out_shape = list(balanced_modes(out_features, count)) if out_shape is None else out_shape
        in_shape = list(balanced_modes(in_features, count)) if in_shape is None else in_shape
        problem = misfit(out_features, in_features, out_shape, in_shape, [1] * (count - 1))
        if problem is None and self.bond_dims is not None and len(self.bond_dims) != count - 1:
            problem = f"`bond_dims`={self.bond_dims} must have {count - 1} entries for {count} cores."
        if problem is not None:
            raise ConfigError(
                f"{problem} Change the options of tensor_train, or leave this weight out with `exclude_modules`."
            )
        bonds = list(full_bonds(out_shape, in_shape))
        most = self.bond_dims or [bonds[k] if self.max_bond is None else self.max_bond for k in range(count - 1)]
        if rank < min(out_features, in_features):
            most = [min(rank, bond) for bond in most]
        bonds = [min(pair) for pair in zip(bonds, most, strict=True)]
        return {"out_shape": out_shape, "in_shape": in_shape, "bonds": _filled(bonds, out_shape, in_shape)}

    def factorize(self, weight, rank, stats):
        wide, layout = weight.double(), self.layout(*weight.shape, rank)
        cores, _ = tensor_train(wide, **layout)
        cores = centred(cores, max(range(len(cores)), key=lambda k: cores[k].numel()))
        rows, columns = wide.shape
        whole = train_matrix(cores)[:rows, :columns]
        unit = torch.eye(min(rows, columns), dtype=torch.float64, device=wide.device)
        pair = (unit, whole) if rows <= columns else (whole, unit)
        return self.measured(wide, Factors(*pair, None, layout=layout, cores=tuple(cores)))

    def error_curve(self, weight, stats):
        wide, bonds = weight.double(), None
        curve = [wide.square().sum()]
        for rank in range(1, min(wide.shape) + 1):
            before, bonds = bonds, self.layout(*wide.shape, rank)["bonds"]
            if bonds == before:
                curve.append(curve[-1])
            else:
                curve.append(self.objective(wide - self.factorize(wide, rank, stats).product(), stats))
        return torch.stack(curve)


def _filled(bonds, out_shape, in_shape):
    """The bonds without what the cores beside them cannot fill, which changes no matrix that fits."""
    sizes = [i * j for i, j in zip(out_shape, in_shape, strict=True)]
    ends = [1, *bonds, 1]
    for k in range(1, len(ends) - 1):
        ends[k] = min(ends[k], ends[k - 1] * sizes[k - 1])
    for k in range(len(ends) - 2, 0, -1):
        ends[k] = min(ends[k], ends[k + 1] * sizes[k])
    return ends[1:-1]


def _given(shapes, size):
    """What `out_shape` or `in_shape` say of a size, or `None`."""
    found = shapes.get(str(size)) if isinstance(shapes, dict) else shapes
    return None if found is None else list(found)


def _checked_shapes(name, value):
    """A list of modes, or lists by size, as JSON keeps them; `None` stays."""
    if isinstance(value, dict):
        return {str(size): _checked_list(name, modes) for size, modes in value.items()}
    return None if value is None else _checked_list(name, value)


def _checked_list(name, value):
    if isinstance(value, (list, tuple)) and value and all(is_integer(number, 1) for number in value):
        return list(value)
    raise ConfigError(f"`{name}`={value!r} of tensor_train must hold lists of integers of at least 1.")
