import dataclasses
import itertools
import math

import torch
from torch import nn

from ..checks import is_integer
from ..errors import DAMAGED, CheckpointError
from ..linalg import Level, Terms, cp_product, split_modes
from .base import FormatLinear, as_parameter, check_rank, plain, register_format, shape_of


# The modes of a weight `(o1 o2, i1 i2)`, in the order of its sizes.
MODES = ("o1", "o2", "i1", "i2")
# Levels beside the two factors.
MOST_LEVELS = 3


@register_format("multi_resolution")
class MultiResolutionLinear(FormatLinear):
    r"""Two factors, and terms of low rank over other ways to merge the halves of outputs and inputs.

        y = x (L R + sum_l W_l)^T + b,    W_l[o1 o2, i1 i2] = sum_r prod_b f_b[r, the indices in block b]

    With outputs numbered `(o1, o2)` and inputs `(i1, i2)`, the blocks `[[o1, o2], [i1, i2]]` are two factors, which
    every layer has; `[[o1, i1], [o2, i2]]` are sums of Kronecker products, `W_l = sum_r A_r kron B_r`; four blocks of
    one are outer products of four vectors. A level is applied block by block to the reshaped input, in the order that
    multiplies least; where that is no less than with its matrix, the matrix is formed for the pass.

    `right` and `left` are ordinary `nn.Linear` children. Weights that adapters are merged into keep their levels.

    Args:
        in_features (`int`): size of each input row.
        out_features (`int`): size of each output row.
        rank (`int`): of the two factors, in `1 .. min(out, in)`.
        bias (`bool`, defaults to `True`): whether `left` carries a bias.
        transposed (`bool`, defaults to `False`): the replaced layer stored its weight as `(in, out)`.
        sizes (`list[int]`, *optional*): `[o1, o2, i1, i2]`; with `levels` only.
        levels (`list[dict]`, *optional*): at most three, each `{"partition": [["o1", "i1"], ["o2", "i2"]], "terms":
            R}`, with every mode in one block of two or more.

    Shapes:
        `right.weight` `(r, in)`, `left.weight` `(out, r)`, `left.bias` `(out,)`; `level_2` and on `(R, sum of the
        sizes of the blocks)`, a row a term, block after block. `sum_l R_l sum_b prod_{k in b} I_k` numbers in all.

    Raises:
        RankError: `rank` is not an integer in range.
        CheckpointError: sizes that are not those of the weight, or a level that is not as above.

    Reference:
        Rozada and Marques, "A multi-resolution low-rank tensor decomposition", 2406.18560, for tensors; that a weight
        is one of four modes is derived.
    """

    bias_name = "left.bias"
    tensors = 2 + MOST_LEVELS

    def __init__(
        self,
        in_features,
        out_features,
        rank,
        bias=True,
        transposed=False,
        sizes=None,
        levels=(),
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, transposed)
        check_rank(rank, out_features, in_features)
        _check_layout(sizes, levels, out_features, in_features)
        self.sizes = list(sizes) if levels else None
        self.partitions = [level["partition"] for level in levels]
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        for name, level in zip(self._names, levels, strict=True):
            shape = level["terms"], sum(block_sizes(level["partition"], sizes))
            setattr(self, name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))
        # What the compiler would have to work out again: for each level its name, its blocks and how it is applied.
        self._steps = [
            (name, _places(p), block_sizes(p, sizes), _plan(p, level["terms"], sizes))
            for name, p, level in zip(self._names, self.partitions, levels, strict=True)
        ]

    @property
    def _names(self):
        return [f"level_{place}" for place in range(2, 2 + len(self.partitions))]

    @property
    def rank(self):
        """Number of rows of `right`, read off the weights."""
        return shape_of(self.right)[0]

    @property
    def levels(self):
        """What the levels beside the two factors are, as the constructor takes it."""
        terms = [getattr(self, name).shape[0] for name in self._names]
        return [{"partition": p, "terms": count} for p, count in zip(self.partitions, terms, strict=True)]

    @property
    def output_rows(self):
        """Without levels, those of two factors; a grid of outputs cannot be reordered."""
        return () if self.partitions else ("left.weight", "left.bias")

    @property
    def input_columns(self):
        """As for `output_rows`."""
        return () if self.partitions else ("right.weight",)

    def spec(self):
        return {**super().spec(), "sizes": self.sizes, "levels": self.levels} if self.partitions else super().spec()

    @classmethod
    def from_spec(cls, spec, in_features, out_features, bias, **kwargs):
        layout = {"sizes": spec.get("sizes"), "levels": spec.get("levels", ())}
        return cls(in_features, out_features, spec.get("rank"), bias=bias, **layout, **kwargs)

    def forward(self, x):
        y, formed = self.left(self.right(x)), None
        for name, places, lengths, plan in self._steps:
            factors = getattr(self, name).split(lengths, dim=1)
            if plan is None:
                matrix = split_modes(cp_product(factors), places, self.sizes).reshape(self.out_features, -1)
                formed = matrix if formed is None else formed + matrix
            else:
                y = y + _applied(plan, factors, x, self.sizes)
        return y if formed is None else y + nn.functional.linear(x, formed)

    def _stored_levels(self, dtype):
        """The [`Level`]s as they are stored, in `dtype`."""
        return [
            Level(places, list(getattr(self, name).to(dtype).split(lengths, dim=1)))
            for name, places, lengths, _ in self._steps
        ]

    @classmethod
    def from_factors(cls, factors, bias=None, dtype=None, transposed=False):
        if factors.rest is not None:
            levels = [{"partition": _names_of(v.partition), "terms": len(v.factors[0])} for v in factors.rest.levels]
            factors = dataclasses.replace(factors, layout={"sizes": list(factors.rest.sizes), "levels": levels})
        layer = cls.for_factors(factors, bias, dtype, transposed)
        layer.left.weight = as_parameter(factors.left, dtype)
        layer.right.weight = as_parameter(factors.right, dtype)
        for name, level in zip(layer._names, factors.rest.levels if layer.partitions else (), strict=True):
            setattr(layer, name, as_parameter(torch.cat(level.factors, dim=1), dtype))
        return layer

    @classmethod
    def cost(cls, out_features, in_features, rank, sizes=None, levels=()):
        finer = sum(level["terms"] * sum(block_sizes(level["partition"], sizes)) for level in levels)
        return rank * (out_features + in_features) + finer

    def dense_weight(self):
        left, right = plain(self.left), plain(self.right)
        wide = torch.promote_types(left.dtype, torch.float32)
        weight = left.to(wide) @ right.to(wide)
        return (weight + Terms(self._stored_levels(wide), self.sizes) if self._steps else weight).to(left.dtype)

    def factors(self):
        return plain(self.left).detach().double(), plain(self.right).detach().double()

    def rest(self):
        with torch.no_grad():
            return Terms(self._stored_levels(torch.float64), self.sizes) if self._steps else None

    def extra_repr(self):
        return f"{super().extra_repr()}, terms={[level['terms'] for level in self.levels]}"


def _places(partition):
    return [[MODES.index(mode) for mode in block] for block in partition]


def _names_of(partition):
    return [[MODES[place] for place in block] for block in partition]


def block_sizes(partition, sizes):
    """Numbers of a factor for each block."""
    return [math.prod(sizes[place] for place in block) for block in _places(partition)]


def _plan(partition, terms, sizes):
    """How a level is applied with the fewest products: `[(block, its sizes, equation)]`; `None` for its matrix."""
    blocks, size = _places(partition), dict(zip("abcd", sizes, strict=True))
    plans = []
    for order in itertools.permutations(range(len(blocks))):
        # z: inputs of a batch; r: terms; a, b, c, d: the modes, of which first those of the input are there.
        have, plan, products = "cd", [], 0
        for place, block in enumerate(order):
            own = "".join("abcd"[mode] for mode in blocks[block])
            left = "".join(mode for mode in "abcd" if (mode in have) != (mode in own))
            before, after = ("zr" if place else "z"), ("z" if place == len(order) - 1 else "zr")
            plan.append((block, [size[mode] for mode in own], f"{before}{have},r{own}->{after}{left}"))
            products += terms * math.prod(size[mode] for mode in {*have, *own})
            have = left
        plans.append((products, plan))
    products, plan = min(plans, key=lambda found: found[0])
    return plan if products < math.prod(sizes) else None


def _applied(plan, factors, x, sizes):
    """`x W_l^T` for `x` `(.., in)`, by the steps of [`_plan`]."""
    z = x.reshape(-1, *sizes[2:])
    for block, own, equation in plan:
        z = torch.einsum(equation, z, factors[block].unflatten(1, own))
    return z.reshape(*x.shape[:-1], sizes[0] * sizes[1])


def _check_layout(sizes, levels, out_features, in_features):
    if not isinstance(levels, (list, tuple)) or len(levels) > MOST_LEVELS:
        raise CheckpointError(
            f"`levels`={levels!r} of a multi_resolution layer must be a list of up to {MOST_LEVELS}. {DAMAGED}"
        )
    if not levels:
        return
    fits = isinstance(sizes, (list, tuple)) and len(sizes) == 4 and all(is_integer(size, 1) for size in sizes)
    if not fits or (sizes[0] * sizes[1], sizes[2] * sizes[3]) != (out_features, in_features):
        raise CheckpointError(
            f"`sizes`={sizes!r} of a multi_resolution layer must be [o1, o2, i1, i2] with o1 o2 = {out_features} and "
            f"i1 i2 = {in_features}. {DAMAGED}"
        )
    for level in levels:
        if not isinstance(level, dict) or not is_partition(level.get("partition")):
            raise CheckpointError(
                f"A level of a multi_resolution layer is {level!r}, and needs a `partition` of {list(MODES)} into two "
                f"blocks or more. {DAMAGED}"
            )
        most = math.prod(sizes) // max(block_sizes(level["partition"], sizes))
        if not is_integer(level.get("terms"), 1, most):
            raise CheckpointError(
                f"`terms`={level.get('terms')!r} of a multi_resolution layer must be an integer in 1..{most}, beyond "
                f"which {level['partition']} has nothing to add. {DAMAGED}"
            )


def is_partition(blocks):
    """Whether `blocks` are two or more lists that hold every mode of a weight once."""
    if not isinstance(blocks, (list, tuple)) or len(blocks) < 2:
        return False
    if not all(isinstance(block, (list, tuple)) and block for block in blocks):
        return False
    modes = [mode for block in blocks for mode in block]
    return all(isinstance(mode, str) for mode in modes) and sorted(modes) == sorted(MODES)
