import torch

from .base import COPIES, GRADIENTS, INPUTS, SAMPLES, Statistic, register_statistic


# Rows of a weight gradient formed at once.
ROWS = 512


@register_statistic("fisher_columns")
class FisherColumns(Statistic):
    r"""Column sums of the empirical Fisher information of a weight, one gradient a sample.

        I_j = sum_s sum_i (d loss_s / d W_ij)^2,    d loss_s / d W = sum_{t in s} g_t x_t^T

    Gradients of different samples are squared one by one, whatever the batch size: the square of a batch's mean
    gradient is another quantity. So are gradients of different experts of one layer, whose sums are added. The loss of
    a sample is the model's own for the labels in the batch, summed over the labelled tokens of the sample; without
    labels it is the negative log-likelihood of labels drawn from the model's predictions, which estimates the true
    Fisher information rather than the empirical one.

    A weight gradient `(out, in)` is never kept: its column norms are those of `g^T x`, which with fewer tokens than
    features come cheaper from `(g g^T)`: `I_j += x_j^T (g g^T) x_j`. Computed in float64.

    Shapes:
        result `(in,)`, at least 0, float64.

    Reference:
        FWSVD, Hsu et al., ICLR 2022, https://arxiv.org/abs/2207.00112. Its "row" is a column here, since the paper
        stores weights as `(in, out)`. Differs: sums instead of means over the tokens of a sample, which only matters
        where a sample has many labels; labels from the model where the data has none.
    """

    sees = (INPUTS, GRADIENTS, SAMPLES, COPIES)
    of_labels = True

    def __init__(self, features, device):
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    @staticmethod
    def shape(out_features, in_features):
        return (in_features,)

    def update(self, inputs, gradients, samples, copies):
        for sample, copy in torch.stack([samples, copies], dim=1).unique(dim=0):
            chosen = (samples == sample) & (copies == copy)
            self._sum += _squared_columns(gradients[chosen].double(), inputs[chosen].double())

    def combine(self, add):
        self._sum = add(self._sum)

    def result(self):
        return self._sum


def _squared_columns(g, x):
    """Column sums of the squares of `g.T @ x`."""
    tokens, rows, columns = len(x), g.shape[1], x.shape[1]
    if tokens * (rows + columns) < rows * columns:
        return ((g @ g.T) @ x).mul_(x).sum(0).clamp_(min=0)
    return sum((block.T @ x).square().sum(0) for block in g.split(ROWS, dim=1))
