from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_choice
from ..errors import ConfigError
from ..linalg import column_weighted, output_energies
from .base import Factors, Method, register_method


# What weighs the inputs and the outputs; what is not here needs no statistic.
STATISTICS = {
    "score": {"in": "importance_columns", "out": "importance_rows"},
    "fisher": {"in": "fisher_columns", "out": "fisher_rows"},
}
IMPORTANCES = (*STATISTICS, "nnz", "none")
# Of the mean importance, added to each: a channel that lost all its weights keeps a little of it.
LEAST = 1e-6


@register_method("lpaf")
@dataclass(frozen=True)
class LPAF(Method):
    r"""Truncated SVD of a pruned weight, its channels weighed by what pruning left of them.

        min_{rank r} |(W - W') D|_F^2,    D = diag(d_j^1/2),    d_j = I_j + 1e-6 mean(I),
        U S V^T = svd(W D),    W' = U_r S_r V_r^T D^-1,    minimum = sum_{i > r} S_i^2

    W has the zeros that [`FirstOrderPruningCallback`] made; zero rows and columns cost no rank. With
    `weight_axis="out"` D stands on the left, and I belongs to the rows. Meant to be followed by training: plain, or
    with the pruned weight beside the factors ([`MixedRankConfig`]).

    Args:
        row_importance (`str`, defaults to `"score"`): what I is, summed over the other axis: `"score"` the positive
            scores of the weights that are left (`calibration=pruning.statistics(model)`); `"fisher"` the Fisher
            information, from labelled batches; `"nnz"` how many weights are left; `"none"` for D = 1, the SVD of the
            pruned weight.
        weight_axis (`str`, defaults to `"in"`): `"in"` weighs columns, which are inputs, `"out"` rows.

    Shapes:
        weight `(out, in)`, statistics `importance_columns` or `fisher_columns` `(in,)`, with `weight_axis="out"`
        `importance_rows` or `fisher_rows` `(out,)`; left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or its importance holds NaN or infinity.

    Reference:
        LPAF, LREC-COLING 2024, https://arxiv.org/abs/2306.14152, its second stage. Reconstructed: there is no public
        code; that one weight a row enters as in FWSVD is from memory, and which statistic it is, is open, hence the
        choice. The paper's rows are columns here, if it writes `y = x W` as FWSVD does. Differs: nothing is divided by
        D, see [`FWSVD`].
    """

    nested: ClassVar[bool] = True
    row_importance: str = "score"
    weight_axis: str = "in"

    def __post_init__(self):
        check_choice("row_importance", self.row_importance, IMPORTANCES, self.name)
        check_choice("weight_axis", self.weight_axis, ("in", "out"), self.name)

    @property
    def statistics(self):
        """The one that says how important each channel is, if one is needed."""
        by_axis = STATISTICS.get(self.row_importance)
        return () if by_axis is None else (by_axis[self.weight_axis],)

    def factorize(self, weight, rank, stats):
        oriented = self._oriented(weight)
        left, right, energies = column_weighted(oriented, self._importance(oriented, stats).sqrt(), rank)
        if self.weight_axis == "out":
            left, right = right.T, left.T
        return Factors.from_energies(left, right, energies)

    def energies(self, weight, stats):
        oriented = self._oriented(weight)
        return output_energies(oriented, self._importance(oriented, stats))

    def objective(self, difference, stats):
        if self.row_importance == "nnz":
            raise ConfigError("The objective of `row_importance`='nnz' cannot be told from a difference of weights.")
        oriented = self._oriented(difference)
        return (oriented.square() * self._importance(oriented, stats)).sum()

    def _oriented(self, weight):
        """The weight with the channels that are weighed as columns."""
        return weight if self.weight_axis == "in" else weight.T

    def _importance(self, oriented, stats):
        """d, `(in,)` or with `weight_axis="out"` `(out,)`, float64."""
        if self.row_importance == "none":
            return oriented.new_ones(oriented.shape[1]).double()
        if self.row_importance == "nnz":
            importance = (oriented != 0).sum(0).double()
        else:
            importance = stats[self.statistics[0]].double()
        return importance + LEAST * importance.mean()
