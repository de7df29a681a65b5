"""Training of compressed models with transformers' `Trainer`."""

from .distillation import Distillation, DistillationTrainer
from .first_order_pruning import FirstOrderPruningCallback
from .mixed_rank import MixedRankCallback, MixedRankTrainer
from .straight_through import StraightThroughFactorizerCallback
from .trained_rank_pruning import TrainedRankPruningCallback


__all__ = [
    "Distillation",
    "DistillationTrainer",
    "FirstOrderPruningCallback",
    "MixedRankCallback",
    "MixedRankTrainer",
    "StraightThroughFactorizerCallback",
    "TrainedRankPruningCallback",
]
