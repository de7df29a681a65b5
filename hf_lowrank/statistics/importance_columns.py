from .base import Statistic, register_statistic


@register_statistic("importance_columns")
class ImportanceColumns(Statistic):
    r"""Column sums of the scores of the weights that pruning kept.

        I_j = sum_i M_ij max(S_ij, 0)

    with the scores S and the mask M of [`FirstOrderPruningCallback`], whose `statistics` has them.

    Shapes:
        result `(in,)`, at least 0, float64.
    """

    collected = False

    @staticmethod
    def shape(out_features, in_features):
        return (in_features,)
