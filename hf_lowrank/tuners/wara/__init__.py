"""WaRA: low-rank updates in a wavelet domain."""

from .._lora import save_as_lora, to_lora
from .._register import register_tuner
from .config import WaraConfig
from .layer import WaraLinear
from .model import WaraModel


register_tuner("wara", WaraConfig, WaraModel)

__all__ = ["WaraConfig", "WaraLinear", "WaraModel", "save_as_lora", "to_lora"]
