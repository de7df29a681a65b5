"""What methods know of the data: one file a statistic, one pass that collects them, one file that keeps them."""

import sys

from ..registry import import_submodules
from .base import STATISTICS, Statistic, register_statistic
from .store import Statistics


import_submodules(sys.modules[__name__])

__all__ = ["STATISTICS", "Statistic", "Statistics", "register_statistic"]
