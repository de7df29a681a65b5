import torch

from .base import Statistic, register_statistic


# Rows per float32 product: short enough that the float64 accumulator, not the product, decides the precision.
ROWS = 2048
# Columns per strip of the upper triangle, which then costs (1 + 128 / n) / 2 of the whole square.
COLUMNS = 128


@register_statistic("input_gram")
class InputGram(Statistic):
    r"""Uncentred second moment of a layer's inputs.

        C = X^T X = sum_t x_t x_t^T,    X `(tokens, in)`

    Products of at most 2048 rows in float32, summed in float64; only the upper triangle is computed.

    Shapes:
        result `(in, in)`, symmetric, float64.
    """

    def __init__(self, in_features, device):
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    @staticmethod
    def shape(out_features, in_features):
        return (in_features, in_features)

    def update(self, rows):
        for block in rows.float().split(ROWS):
            for start in range(0, block.shape[1], COLUMNS):
                strip = slice(start, start + COLUMNS)
                self.gram[strip, start:] += block[:, strip].T @ block[:, start:]

    def result(self):
        upper = self.gram.triu()
        return upper + upper.triu(1).T
