"""Who gets how much of the budget: one file an allocator, found by importing this package."""

import sys

from ..registry import import_submodules
from .base import ALLOCATORS, Allocator, Candidate, register_allocator
from .rounding import round_down


import_submodules(sys.modules[__name__])

__all__ = ["ALLOCATORS", "Allocator", "Candidate", "register_allocator", "round_down"]
