from .base import Statistic, register_statistic


@register_statistic("importance_rows")
class ImportanceRows(Statistic):
    r"""Row sums of the scores of the weights that pruning kept.

        I_i = sum_j M_ij max(S_ij, 0)

    as [`ImportanceColumns`], for outputs.

    Shapes:
        result `(out,)`, at least 0, float64.
    """

    collected = False

    @staticmethod
    def shape(out_features, in_features):
        return (out_features,)
