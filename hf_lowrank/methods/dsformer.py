import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_integer, check_number
from ..errors import ConfigError
from ..formats import check_rank
from ..linalg import balanced, best_atoms, better_codes, pursue, require_finite, truncated_svd
from ._measured import Measured
from .base import Factors, register_method


@register_method("dsformer")
@dataclass(frozen=True)
class DSFormer(Measured):
    r"""A small dictionary, and few atoms for every row of the weight; needs no data. Reconstructed.

        min_{D, S} |W - S D|_F^2,    D `(r, in)`,    every row of S with ceil(density r) non-zeros

    From the leading singular vectors, in turn: the codes of each row by orthogonal matching pursuit, where that is
    better than the codes at hand; the dictionary by least squares. No step makes the error larger. It starts below
    that of a truncated SVD of rank `ceil(density r)`, of which it is an instance; with `density=1` it is a truncated
    SVD of rank r. The pursuit is greedy, and the error need not fall with every single rank. The rank of a layer is
    the number of its atoms.

    Args:
        density (`float`, defaults to 0.25): atoms a row combines as a share of all, in (0, 1].
        blocks (`int`, defaults to 1): parts of the rows that have a dictionary each, a divisor of `out`.
        sweeps (`int`, defaults to 5): how often both steps are made, 0 or more.

    Shapes:
        weight `(out, in)`, left `(out, blocks * r)`, block-diagonal, right `(blocks * r, in)`. Computed in float64, on
        some copies of the whole weight.

    Raises:
        ConfigError: an option out of range, or `blocks` that do not divide the rows of a weight.
        RankError: more atoms than a block has rows.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        DSFormer, 2312.13211, of which the abstract is known: a dense times a semi-structured sparse factor. Algorithm,
        start and all defaults are reconstructed. Its training, [`StraightThroughFactorizerCallback`].
    """

    format: ClassVar[str] = "dense_sparse"
    only_format: ClassVar[bool] = True
    density: float = 0.25
    blocks: int = 1
    sweeps: int = 5

    def __post_init__(self):
        check_number("density", self.density, 0, 1, self.name, open_low=True)
        check_integer("blocks", self.blocks, 1, self.name)
        check_integer("sweeps", self.sweeps, 0, self.name)

    def terms(self, rank):
        # The product may miss a whole number by a rounding.
        return max(1, math.ceil(self.density * rank - 1e-9))

    def layout(self, out_features, in_features, rank):
        if out_features % self.blocks:
            raise ConfigError(
                f"`blocks`={self.blocks} of dsformer does not divide the rows of a {out_features} x {in_features} "
                "weight; choose another number, or leave the layer out with `exclude_modules`."
            )
        return {"nonzeros": self.terms(rank), "blocks": self.blocks}

    def factorize(self, weight, rank, stats):
        require_finite(weight, "The weight")
        weight = weight.double()
        layout = self.layout(*weight.shape, rank)
        parts = weight.unflatten(0, (self.blocks, -1))
        check_rank(rank, *parts.shape[1:])
        found = [self._alternate(rows, rank, layout["nonzeros"]) for rows in parts]
        left, right = torch.block_diag(*(codes for codes, _ in found)), torch.cat([atoms for _, atoms in found])
        return self.measured(weight, Factors(left, right, None, layout=layout))

    def _alternate(self, rows, rank, terms):
        codes, atoms, _ = truncated_svd(rows, rank)
        if terms < rank:
            norms = atoms.norm(dim=1, keepdim=True)
            atoms = torch.where(norms > 0, atoms / norms, 0.0)
            codes = pursue(rows, atoms, terms)
            for _ in range(self.sweeps):
                atoms = _revived(best_atoms(rows, codes), codes, rows)
                codes = better_codes(codes, pursue(rows, atoms, terms), atoms, rows)
            atoms = best_atoms(rows, codes)
        return balanced(codes, atoms)


def _revived(atoms, codes, rows):
    """Atoms of which those that no row uses are replaced by the rows that are met worst, which changes no product."""
    unused = ~(codes != 0).any(0)
    residual = rows - codes @ atoms
    worst = residual.norm(dim=1).sort(descending=True, stable=True).indices[: int(unused.sum())]
    return atoms.masked_scatter(unused[:, None], residual[worst])
