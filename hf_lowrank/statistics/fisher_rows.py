from .base import COPIES, GRADIENTS, INPUTS, SAMPLES, register_statistic
from .fisher_columns import FisherColumns


@register_statistic("fisher_rows")
class FisherRows(FisherColumns):
    r"""Row sums of the empirical Fisher information of a weight, one gradient a sample.

        I_i = sum_s sum_j (d loss_s / d W_ij)^2,    d loss_s / d W = sum_{t in s} g_t x_t^T

    What [`FisherColumns`] is for the inputs of a layer, for its outputs.

    Shapes:
        result `(out,)`, at least 0, float64.
    """

    # The transposed gradient is that of inputs and gradients exchanged.
    sees = (GRADIENTS, INPUTS, SAMPLES, COPIES)

    @staticmethod
    def shape(out_features, in_features):
        return (out_features,)
