"""How factors are computed: one file a method, found by importing this package."""

import sys

from ..registry import import_submodules
from .base import METHODS, Factors, Method, register_method


import_submodules(sys.modules[__name__])

__all__ = ["METHODS", "Factors", "Method", "register_method"]
