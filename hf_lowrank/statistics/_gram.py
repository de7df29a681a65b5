"""A sum of outer products in float64, fed with float32 products."""

import torch


# Rows per float32 product: short enough that the float64 accumulator, not the product, decides the precision.
ROWS = 2048
# Columns per strip of the upper triangle, which then costs (1 + 128 / n) / 2 of the whole square.
COLUMNS = 128


class Gram:
    """`sum_t x_t x_t^T` over rows `x_t`; only the upper triangle is computed.

    Args:
        features (`int`): size of a row.
        device (`torch.device`): where the sum lives.
    """

    def __init__(self, features, device):
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, rows):
        """Add rows `(tokens, features)`."""
        for block in rows.float().split(ROWS):
            for start in range(0, block.shape[1], COLUMNS):
                strip = slice(start, start + COLUMNS)
                self._sum[strip, start:] += block[:, strip].T @ block[:, start:]

    def combine(self, add):
        """Make it the sum over all processes; `add` is as in [`Statistic.combine`]."""
        self._sum = add(self._sum)

    def result(self):
        """The whole symmetric matrix; takes over the accumulator, which is done with."""
        full = self._sum
        for start in range(0, len(full), COLUMNS):
            strip = slice(start, start + COLUMNS)
            square = full[strip, strip]
            square.copy_(square.triu() + square.triu(1).T)
            full[strip.stop :, strip] = full[strip, strip.stop :].T
        return full
