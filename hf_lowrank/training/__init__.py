"""Training of compressed models with transformers' `Trainer`."""

from .basis_selection import BasisSelectionCallback
from .dimension_squeezing import DimensionSqueezingCallback
from .distillation import Distillation, DistillationTrainer
from .first_order_pruning import FirstOrderPruningCallback
from .maestro import MaestroCallback
from .maestro_ranks import keep_leading, maestro_ranks
from .maestro_trainer import MaestroTrainer
from .mixed_rank import MixedRankCallback, MixedRankTrainer
from .sequential_freezing import SequentialFreezingCallback
from .straight_through import StraightThroughFactorizerCallback
from .trained_rank_pruning import TrainedRankPruningCallback


__all__ = [
    "BasisSelectionCallback",
    "DimensionSqueezingCallback",
    "Distillation",
    "DistillationTrainer",
    "FirstOrderPruningCallback",
    "MaestroCallback",
    "MaestroTrainer",
    "MixedRankCallback",
    "MixedRankTrainer",
    "SequentialFreezingCallback",
    "StraightThroughFactorizerCallback",
    "TrainedRankPruningCallback",
    "keep_leading",
    "maestro_ranks",
]
