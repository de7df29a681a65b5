import torch

from .base import GRADIENTS, INPUTS, Statistic, register_statistic


@register_statistic("weight_gradient")
class WeightGradient(Statistic):
    r"""The gradient of the calibration loss with respect to a weight.

        D = sum_t g_t x_t^T,    g_t = d loss / d y_t `(out,)`

    The loss is the model's own for the labels in the batches, summed over the labelled tokens of all of them, so that
    gradients of different layers are in one unit: the loss changes by `<D, dW>` with a small change of a weight. With
    labels drawn from the model's predictions D would be noise about zero. Products in float32 of the tokens of one
    batch, summed in float64.

    Takes as much memory as the weight in float64.

    Shapes:
        result `(out, in)`, float64.

    Reference:
        Zero Sum SVD (ICML 2026), https://arxiv.org/abs/2602.02848, which takes the mean over batches; one factor for
        all layers does not change what is chosen by it.
    """

    sees = (INPUTS, GRADIENTS)
    of_labels = True
    needs_labels = True

    def __init__(self, shape, device):
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)

    @classmethod
    def empty(cls, out_features, in_features, device):
        return cls((out_features, in_features), device)

    @staticmethod
    def shape(out_features, in_features):
        return (out_features, in_features)

    @classmethod
    def join(cls, tensors):
        return torch.cat(tensors)

    def update(self, inputs, gradients):
        self._sum += gradients.float().T @ inputs.float()

    def combine(self, add):
        self._sum = add(self._sum)

    def result(self):
        return self._sum
