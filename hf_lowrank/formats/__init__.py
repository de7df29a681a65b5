"""How a weight is stored and applied: one file a format, found by importing this package."""

import sys

from ..registry import import_submodules
from ._dense_view import DenseView
from ._face import LinearFace, put_face_on, take_face_off
from ._lending import LendingLinear
from .base import (
    FORMATS,
    FormatLinear,
    as_parameter,
    check_rank,
    exact_factors,
    is_packed,
    plain,
    register_format,
)
from .conv import LowRankConv
from .dense import DenseLinear
from .dense_sparse import DenseSparseLinear
from .hybrid_rows import HybridRowsLinear
from .low_rank import LowRankLinear
from .multi_resolution import MultiResolutionLinear
from .pivoted import PivotedLinear
from .shared_basis import SharedBasisLinear
from .sparse_low_rank import SparseLowRankLinear
from .tensor_train import TensorTrainLinear, misfit
from .weighted_bases import WeightedBasesLinear


import_submodules(sys.modules[__name__])

__all__ = [
    "FORMATS",
    "DenseLinear",
    "DenseSparseLinear",
    "DenseView",
    "FormatLinear",
    "HybridRowsLinear",
    "LendingLinear",
    "LinearFace",
    "LowRankConv",
    "LowRankLinear",
    "MultiResolutionLinear",
    "PivotedLinear",
    "SharedBasisLinear",
    "SparseLowRankLinear",
    "TensorTrainLinear",
    "WeightedBasesLinear",
    "as_parameter",
    "check_rank",
    "exact_factors",
    "is_packed",
    "misfit",
    "plain",
    "put_face_on",
    "register_format",
    "take_face_off",
]
