"""How a weight is stored and applied: one file a format, found by importing this package."""

import sys

from ..registry import import_submodules
from ._face import LinearFace, put_face_on, take_face_off
from .base import (
    FORMATS,
    DenseView,
    FormatLinear,
    as_parameter,
    check_rank,
    exact_factors,
    is_packed,
    plain,
    register_format,
)
from .conv import LowRankConv
from .dense_sparse import DenseSparseLinear
from .low_rank import LowRankLinear
from .pivoted import PivotedLinear
from .shared_basis import SharedBasisLinear
from .sparse_low_rank import SparseLowRankLinear
from .weighted_bases import WeightedBasesLinear


import_submodules(sys.modules[__name__])

__all__ = [
    "FORMATS",
    "DenseSparseLinear",
    "DenseView",
    "FormatLinear",
    "LinearFace",
    "LowRankConv",
    "LowRankLinear",
    "PivotedLinear",
    "SharedBasisLinear",
    "SparseLowRankLinear",
    "WeightedBasesLinear",
    "as_parameter",
    "check_rank",
    "exact_factors",
    "is_packed",
    "plain",
    "put_face_on",
    "register_format",
    "take_face_off",
]
