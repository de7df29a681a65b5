import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_boolean, check_choice, check_integer, is_integer
from ..errors import ConfigError
from ..linalg import require_finite, truncated_svd
from ._measured import Measured
from ._start import drawn_left, drawn_right
from .base import Factors, register_method


AUTO = "auto"
SELECTIONS = ("leverage", "residual")


@register_method("hybrid")
@dataclass(frozen=True)
class Hybrid(Measured):
    r"""Some rows of the weight are free, and all others are of rank one: much rank for few numbers; needs no data.

        min |W - W'|_F^2,    W'[U] = W_u,    W'[rest] = L R of rank k,    rank W' = j + k with j rows in U

    Meant to be trained from scratch (`from_scratch=True`, on a model that was built from a config, and then a plain
    `Trainer`): at the same number of parameters a square weight has about twice the rank of two factors. Of a weight
    that is trained already it is a poor approximation: `W' = W` in the rows of U, the others a truncated SVD of
    `W[rest]`, and [`SVD`] with as many numbers has the lower error, unless a few rows stand out or the spectrum is
    flat. The rank of a layer is j + k.

    Args:
        dense_rows (`int` or `"auto"`, defaults to `"auto"`): j; `"auto"` is all of the rank but `lower_rank`. With a
            number, the rest of the rank is k.
        lower_rank (`int`, defaults to 1): k, at least 1; for `dense_rows="auto"`.
        selection (`str`, defaults to `"leverage"`): how U is chosen, of trained weights: the rows with the largest
            leverage `|U_r[i]|^2` on the leading `j + k` singular vectors; or `"residual"`, those that an SVD of rank k
            misses most.
        from_scratch (`bool`, defaults to `False`): draw the numbers anew instead, with the first rows free:
            `W_u, R ~ U(-1/sqrt(in), 1/sqrt(in))`, `L ~ U(-sqrt(3/k), sqrt(3/k))`, so that W' has the variance of a new
            `nn.Linear`. What a trained model knows would be lost, so that `from_pretrained` refuses it.

    Shapes:
        weight `(out, in)`, left `(out, j + k)`, right `(j + k, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight holds NaN or infinity.

    Reference:
        HMF of Thakker et al., "Rank and run-time aware compression of NLP applications", 2010.03193 (1906.04886), of
        which the abstract is known; there it is trained. Factorizing a trained weight, and the choice of rows, are
        ours, as is the start.
    """

    format: ClassVar[str] = "hybrid_rows"
    only_format: ClassVar[bool] = True
    dense_rows: object = AUTO
    lower_rank: int = 1
    selection: str = "leverage"
    from_scratch: bool = False

    def __post_init__(self):
        if self.dense_rows != AUTO and not is_integer(self.dense_rows, 0):
            raise ConfigError(
                f"`dense_rows`={self.dense_rows!r} of hybrid must be an integer of at least 0, or {AUTO!r} for all of "
                "the rank but `lower_rank`."
            )
        check_integer("lower_rank", self.lower_rank, 1, self.name)
        if self.dense_rows != AUTO and self.lower_rank != 1:
            raise ConfigError(
                f"`lower_rank`={self.lower_rank} and `dense_rows`={self.dense_rows} of hybrid leave nothing for the "
                "budget to decide; give one of them."
            )
        check_choice("selection", self.selection, SELECTIONS, self.name)
        check_boolean("from_scratch", self.from_scratch, self.name)

    @property
    def initialises(self):
        """Whether the numbers are drawn, rather than found."""
        return self.from_scratch

    def terms(self, rank):
        # A free row is one of its own; the others combine these.
        return min(self.lower_rank, rank) if self.dense_rows == AUTO else max(1, rank - self.dense_rows)

    def layout(self, out_features, in_features, rank):
        layout = {"lower_rank": self.terms(rank)}
        return {**layout, "rows_first": True} if self.from_scratch else layout

    def factorize(self, weight, rank, stats):
        layout = self.layout(*weight.shape, rank)
        free = rank - layout["lower_rank"]
        if self.from_scratch:
            rows, left, right = self._drawn(weight.shape, free, layout["lower_rank"], stats["seed"])
            order = torch.arange(weight.shape[0])
        else:
            require_finite(weight, "The weight")
            weight = weight.double()
            chosen = self._chosen(weight, free, rank)
            others = torch.ones(len(weight), dtype=torch.bool, device=weight.device).index_fill(0, chosen, False)
            left, right, _ = truncated_svd(weight[others], layout["lower_rank"])
            rows, order = weight[chosen], torch.cat([chosen, others.nonzero().flatten()]).argsort()
        whole = torch.block_diag(torch.eye(free, dtype=torch.float64, device=left.device), left)[order.to(left.device)]
        found = Factors(whole, torch.cat([rows, right]), None, layout=layout)
        if not self.from_scratch:
            return self.measured(weight, found)
        return dataclasses.replace(found, left=found.left.to(weight.device), right=found.right.to(weight.device))

    def _chosen(self, weight, count, rank):
        """The free rows, rising."""
        if self.selection == "leverage":
            # The orthonormal factor is on the smaller side: scaled by singular values where that is the other one.
            left, right, energies = truncated_svd(weight, rank)
            known = energies[:rank] > torch.finfo(energies.dtype).eps * energies[0]
            scale = left.norm(dim=0)
            scores = torch.where(known, left / torch.where(scale > 0, scale, 1.0), 0.0).square().sum(1)
        else:
            left, right, _ = truncated_svd(weight, rank - count)
            scores = (weight - left @ right).square().sum(1)
        # Stable, so that of equal rows the first count.
        return scores.sort(descending=True, stable=True).indices[:count].sort().values

    @staticmethod
    def _drawn(shape, free, lower_rank, seed):
        generator = torch.Generator().manual_seed(seed)
        rows, right = (drawn_right(generator, count, shape[1]) for count in (free, lower_rank))
        return rows, drawn_left(generator, shape[0] - free, lower_rank), right
