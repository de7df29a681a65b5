"""A factorized layer that passes for an `nn.Linear`, for libraries that adapt nothing else.

As torch's parametrizations do, the class of the instance is exchanged for a subclass, and changed back afterwards:
parameters, names, hooks and references to the layer stay what they are.
"""

import functools

import torch
from torch import nn

from ..errors import ComputedWeightError
from ._dense_view import LOST, DenseView
from .base import FORMATS


class LinearFace:
    """Mixed into a format: `isinstance(layer, nn.Linear)`, and a `weight` `(out, in)` whatever it replaced."""

    @property
    def weight(self):
        """The dense weight `(out, in)`, read-only, formed only if its values are used."""
        return self.dense_weight() if torch.compiler.is_compiling() else DenseView(self, transposed=False)

    def __setattr__(self, name, value):
        # Whoever hands over a linear layer assigns its weight and bias to its successor, here to the layer itself.
        if name == "weight" and not (isinstance(value, DenseView) and value.layer is self):
            raise ComputedWeightError(f"Assigning `weight` {LOST}")
        if name == "bias" and value is not self.bias:
            raise ComputedWeightError(
                f"Assigning `bias` of a factorized layer is not supported; set {self.bias_name}."
            )
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol):
        return _rebuild, (FORMATS[self.name],), self.__dict__


@functools.cache
def _faced(cls):
    return type(cls.__name__, (LinearFace, cls, nn.Linear), {"__module__": cls.__module__})


def _rebuild(cls):
    layer = cls.__new__(cls)
    layer.__class__ = _faced(cls)
    return layer


def put_face_on(layer):
    """Make `layer`, of any format, pass for an `nn.Linear`."""
    if not isinstance(layer, LinearFace):
        layer.__class__ = _faced(type(layer))


def take_face_off(layer):
    """Undo [`put_face_on`]."""
    if isinstance(layer, LinearFace):
        layer.__class__ = FORMATS[layer.name]
