"""Training of compressed models with transformers' `Trainer`."""

from .distillation import Distillation, DistillationTrainer
from .first_order_pruning import FirstOrderPruningCallback
from .mixed_rank import MixedRankCallback, MixedRankTrainer


__all__ = ["Distillation", "DistillationTrainer", "FirstOrderPruningCallback", "MixedRankCallback", "MixedRankTrainer"]
