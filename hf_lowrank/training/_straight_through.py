"""A dense layer in training that computes with an approximation of its weight, and hands gradients to the weight."""

import torch
from torch import nn
from torch.nn.functional import linear

from ..replace import Made, put


class StraightThroughLinear(nn.Module):
    r"""In the place of a linear layer: forward with `F(W)`, backward as if it were `W`.

        y = x F(W)^T + b,    dL/dW := dL/dF(W);    with `tuning`, F(W) itself is trained and W rests

    `weight` and `bias` are those of the layer it stands for, under the same names, so that a checkpoint of the
    training holds a dense model too. Both sets of parameters exist from the beginning: an optimizer knows them all,
    and passes over those that got no gradient.

    Args:
        dense (`torch.nn.Module`): a layer of one of the kinds that can be factorized.
        site ([`Site`]): where it is.
        factorized ([`FormatLinear`]): F(W), without a bias.
    """

    # What it saves is W, and F(W) no layer of a model of its own.
    stands_for_dense = True

    def __init__(self, dense, site, factorized):
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.factorized = factorized
        self.site = site
        self.in_features, self.out_features = site.in_features, site.out_features
        self.tuning = False
        self.train(dense.training)

    def forward(self, x):
        if self.tuning:
            y = self.factorized(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        weight = self.weight.T if self.site.kind.transposed else self.weight
        with torch.no_grad():
            approximate = self.factorized.dense_weight()
        return linear(x, _StraightThrough.apply(weight, approximate), self.bias)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, tuning={self.tuning}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, approximate):
        return approximate

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def straight_through_layers(model):
    """`{name: layer}` of the layers of `model` that train so, in the order of its modules."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, StraightThroughLinear)}


@torch.no_grad()
def refresh(layer, method):
    """Compute F(W) anew, in the tensors that are there."""
    site, factorized = layer.site, layer.factorized
    weight = layer.weight.T if site.kind.transposed else layer.weight
    factors = method.factorize(weight.detach(), factorized.rank, {})
    made = type(factorized).from_factors(factors, None, layer.weight.dtype, factorized.transposed)
    factorized.load_state_dict(made.state_dict(), strict=True)


def finish(model, name, layer):
    """Put the factorized layer in the place of `layer`, called `name`."""
    tensors = layer.factorized.state_dict(keep_vars=True)
    put(model, layer.site, Made(layer.factorized.spec(), {f"{name}.{key}": tensor for key, tensor in tensors.items()}))
