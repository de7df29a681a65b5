"""How low the rank of every matrix is already: what zeros have done to it, and where its energy sits."""

from dataclasses import asdict, dataclass

import torch

from ..checks import is_number
from ..errors import ConfigError, TargetError
from ..formats import is_packed
from ..linalg import energy_rank, require_finite
from ..surgery import match_sites
from .table import aligned


@dataclass(frozen=True)
class MatrixRank:
    """One matrix.

    Args:
        name (`str`): the module; of several weights in one, each with its number.
        out_features (`int`): rows.
        in_features (`int`): columns.
        rank (`int`): singular values above what rounding of the weight makes: `eps |W|_F` with the eps of its dtype.
        energy_rank (`int`): the lowest rank that keeps the share of the squared weight that was asked for.
        zero_rows (`int`): rows without any weight.
        zero_columns (`int`): columns without any weight.
        nonzero (`float`): share of entries that are not zero, in [0, 1].
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    energy_rank: int
    zero_rows: int
    zero_columns: int
    nonzero: float


@dataclass(frozen=True)
class RankProfile:
    """The ranks of all matrices; `print(profile)` shows a table.

    Args:
        rows (`list[MatrixRank]`): in the order of the model.
        energy (`float`): the share that `energy_rank` keeps.
    """

    rows: list
    energy: float

    def mean(self, name):
        """The mean of `name`, an attribute of [`MatrixRank`], over all matrices; ranks as shares of the full rank."""
        values = [getattr(row, name) for row in self.rows]
        if name in ("rank", "energy_rank"):
            full = [min(row.out_features, row.in_features) for row in self.rows]
            values = [value / most for value, most in zip(values, full, strict=True)]
        return sum(values) / len(values)

    def to_json(self):
        """Everything as plain JSON."""
        return {"energy": self.energy, "matrices": [asdict(row) for row in self.rows]}

    def __str__(self):
        head = ("matrix", "shape", "rank", f"{self.energy:.0%} energy", "zero rows", "zero columns", "nonzero")
        cells = [
            (
                row.name,
                f"{row.out_features} x {row.in_features}",
                str(row.rank),
                str(row.energy_rank),
                str(row.zero_rows),
                str(row.zero_columns),
                f"{row.nonzero:.1%}",
            )
            for row in self.rows
        ]
        total = (
            f"{len(self.rows)} matrices: rank {self.mean('rank'):.1%} of the full one, {self.mean('energy_rank'):.1%} "
            f"for {self.energy:.0%} of the energy, {self.mean('nonzero'):.1%} of entries not zero"
        )
        return "\n".join([*aligned([head, *cells]), total])


@torch.no_grad()
def rank_profile(model, energy=0.9, target_modules="all-linear", exclude_modules=None):
    r"""Tabulate the ranks of the dense matrices of `model`, as of a pruned one before it is factorized.

        rank = #{i : s_i > eps |W|_F},    energy rank = min {r : sum_{i <= r} s_i^2 >= energy sum_i s_i^2}

    Args:
        model (`torch.nn.Module`): with its weights in memory.
        energy (`float`, defaults to 0.9): share of the squared weight, in (0, 1].
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): as in [`LowRankConfig`].
        exclude_modules (`str` or `list[str]`, *optional*): likewise.

    Returns:
        [`RankProfile`]; print it, or read its `rows`.

    Raises:
        ConfigError: `energy` out of range.
        TargetError: a pattern that matches no dense linear layer; a weight that is offloaded, or quantized.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if not is_number(energy) or not 0 < energy <= 1:
        raise ConfigError(f"`energy`={energy!r} must be in (0, 1]: the share of the squared weight that is kept.")
    sites = match_sites(model, target_modules, exclude_modules)
    for site in sites:
        _check_weight(model, site)
    rows = []
    for site in sites:
        weight = site.kind.weight(model, site)
        require_finite(weight, f"The weight of {site.name}")
        for copy, matrix in enumerate(weight):
            rows.append(_of_matrix(f"{site.name}[{copy}]" if site.copies > 1 else site.name, matrix, energy))
    return RankProfile(rows, energy)


def _check_weight(model, site):
    weight = model.get_parameter(site.weight_name)
    if weight.is_meta:
        problem = "is on disk or on the meta device; load the model without offloading"
    elif is_packed(weight):
        problem = "is quantized, and its rank is that of roundings; give the model that it was made from"
    else:
        return
    raise TargetError(f"The weight of {site.name} {problem}, or leave it out with `exclude_modules`.")


def _of_matrix(name, matrix, energy):
    values = torch.linalg.svdvals(matrix.double())
    squares, present = values.square(), matrix != 0
    return MatrixRank(
        name,
        *matrix.shape,
        rank=int((values > torch.finfo(matrix.dtype).eps * squares.sum().sqrt()).sum()),
        energy_rank=energy_rank(squares, energy),
        zero_rows=int((~present.any(1)).sum()),
        zero_columns=int((~present.any(0)).sum()),
        nonzero=float(present.double().mean()),
    )
