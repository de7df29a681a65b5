"""Mixed-rank fine-tuning: full-rank weights that hand over to their factors, step by step."""

from .._register import register_tuner
from .config import MixedRankConfig
from .layer import MixedRankLinear
from .model import MixedRankModel


register_tuner("mixed_rank", MixedRankConfig, MixedRankModel)

__all__ = ["MixedRankConfig", "MixedRankLinear", "MixedRankModel"]
