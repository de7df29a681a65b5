"""Adapters for PEFT: `peft.get_peft_model(model, config)` with a config of ours. Importing it registers them."""

from ._config import TargetConfig, TunerConfig
from ._layer import FactorTunerLinear
from ._lora import save_as_lora, to_lora
from ._model import FactorTuner
from ._register import TUNERS, register_tuner
from .mixed_rank import MixedRankConfig, MixedRankModel
from .wara import WaraConfig, WaraModel


__all__ = [
    "TUNERS",
    "FactorTuner",
    "FactorTunerLinear",
    "MixedRankConfig",
    "MixedRankModel",
    "TargetConfig",
    "TunerConfig",
    "WaraConfig",
    "WaraModel",
    "register_tuner",
    "save_as_lora",
    "to_lora",
]
