import torch

from ._gram import ROWS


class CrossGram:
    r"""Second moments of the inputs a layer gets in the dense model with those it gets in the compressed one.

        A = X^T Y = sum_t x_t y_t^T,    X, Y `(tokens, in)`, row t of both from the same token

    Not registered, since no pass over one model could collect it. Products of at most 2048 rows in float32, summed in
    float64.

    Args:
        features (`int`): size of a row.
        device (`torch.device`): where the sum lives.

    Shapes:
        result `(in, in)`, float64.
    """

    def __init__(self, features, device):
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, dense, compressed):
        """Add the rows of some tokens, from both models."""
        for x, y in zip(dense.float().split(ROWS), compressed.float().split(ROWS), strict=True):
            self._sum += x.T @ y

    def result(self):
        """The finished tensor."""
        return self._sum
