"""Training of compressed models with transformers' `Trainer`."""

from .distillation import Distillation, DistillationTrainer
from .mixed_rank import MixedRankCallback, MixedRankTrainer
from .straight_through import StraightThroughFactorizerCallback


__all__ = [
    "Distillation",
    "DistillationTrainer",
    "MixedRankCallback",
    "MixedRankTrainer",
    "StraightThroughFactorizerCallback",
]
