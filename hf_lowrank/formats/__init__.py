"""How a weight is stored and applied: one file a format, found by importing this package."""

import sys

from ..registry import import_submodules
from .base import FORMATS, DenseView, FormatLinear, check_rank, register_format
from .low_rank import LowRankLinear


import_submodules(sys.modules[__name__])

__all__ = ["FORMATS", "DenseView", "FormatLinear", "LowRankLinear", "check_rank", "register_format"]
