"""Checks that third parties can run on their own methods, formats, allocators and tuners, and tiny models for them."""

from .allocators import SyntheticProbe, check_allocator
from .formats import check_format
from .matrices import make_gram, make_inputs, make_weight
from .methods import check_method
from .models import ARCHITECTURES, tiny_model


__all__ = [
    "ARCHITECTURES",
    "SyntheticProbe",
    "check_allocator",
    "check_format",
    "check_method",
    "check_tuner",
    "make_gram",
    "make_inputs",
    "make_weight",
    "tiny_model",
]


def __getattr__(name):
    # PEFT is optional.
    if name == "check_tuner":
        from .tuners import check_tuner

        return check_tuner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
