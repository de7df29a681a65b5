"""Who gets how much of the budget: one file an allocator, found by importing this package."""

import sys

from ..registry import import_submodules
from .base import ALLOCATORS, Allocator, Candidate, Probe, register_allocator
from .energy import rank_for_energy
from .rounding import allowed_ranks, cost_of, fill, foot_of_step, round_down, within_reach


import_submodules(sys.modules[__name__])

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "Candidate",
    "Probe",
    "allowed_ranks",
    "cost_of",
    "fill",
    "foot_of_step",
    "rank_for_energy",
    "register_allocator",
    "round_down",
    "within_reach",
]
