import torch

from ._gram import Gram
from .base import GRADIENTS, Statistic, register_statistic


# A token's gradient counts as at least 0.1 and at most 10 times the mean norm of its batch.
CLIP = (0.1, 10.0)
# Below this fraction of the mean norm, a gradient may be nothing but rounding (the first query of a causal attention
# has none) and is not scaled up.
ROUNDING = 1e-3


@register_statistic("gradient_gram")
class GradientGram(Gram, Statistic):
    r"""Second moment of the loss gradients at a layer's outputs, one gradient a token.

        G = mean_t g_t g_t^T,    g_t = d loss / d y_t `(out,)`

    The loss is the negative log-likelihood of labels drawn from the model's own predictions, summed over tokens, so
    that G estimates the output side of the Kronecker-factored Fisher matrix and not the fit to some text. A mean over
    as many tokens as `input_gram` is a sum of: their Kronecker product is then the Fisher matrix of all tokens, also
    where layers see different numbers of them (encoder and decoder, experts). Norms are clipped to [0.1, 10] times the
    mean norm of the batch: a few tokens would otherwise decide.

    Shapes:
        result `(out, out)`, symmetric, float64.

    Reference:
        Martens and Grosse, K-FAC, ICML 2015, https://arxiv.org/abs/1503.05671. The clipping follows LEMS (ICML 2026),
        from memory; it also drops the first and last eighth of the tokens, which is not done here.
    """

    sees = (GRADIENTS,)

    def __init__(self, features, device):
        super().__init__(features, device)
        self._rows = torch.zeros((), dtype=torch.float64, device=device)

    @staticmethod
    def shape(out_features, in_features):
        return (out_features, out_features)

    @classmethod
    def join(cls, tensors):
        return torch.block_diag(*tensors)

    def combine(self, add):
        super().combine(add)
        self._rows = add(self._rows)

    def result(self):
        return super().result().div_(self._rows.clamp(min=1))

    def update(self, rows):
        self._rows += len(rows)
        rows = rows.float()
        norms = rows.norm(dim=1)
        positive = norms > 0
        if not positive.any():
            return
        mean = norms[positive].mean()
        clipped = norms.clamp(CLIP[0] * mean, CLIP[1] * mean)
        scale = torch.where(norms > ROUNDING * mean, clipped / norms, 1)
        super().update(rows * scale[:, None])
