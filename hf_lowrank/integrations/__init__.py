"""Where the library meets transformers, accelerate, PEFT and the Hub. Importing it registers the plugin."""

import logging

from transformers import configuration_utils
from transformers.utils import logging as transformers_logging

from . import conv1d, experts
from .auto_fact import auto_fact
from .autoload import inheriting
from .calibration import Calibration
from .config import QUANT_METHOD, LowRankConfig
from .from_pretrained import install_keyword
from .guard import install_guard
from .hub import install_push
from .model_card import model_card
from .onnx import share_initializers
from .out_of_core import FactorizedCheckpoint, calibrate_checkpoint, factorize_checkpoint
from .parallel import install_parallel_plans
from .peft_lora import install_when_imported, residual_adapter, train_only
from .pruning import prune_channels
from .quantizer import LowRankQuantizer
from .saving import install_saving
from .verbs import collect_statistics, factorize, to_dense


install_keyword()
install_saving()
install_guard(QUANT_METHOD)
inheriting(configuration_utils)
install_parallel_plans()
install_when_imported()
install_push()
# Messages go where transformers' go, at the verbosity the user set there.
logging.getLogger("hf_lowrank").parent = transformers_logging.get_logger("transformers")

__all__ = [
    "Calibration",
    "FactorizedCheckpoint",
    "LowRankConfig",
    "LowRankQuantizer",
    "auto_fact",
    "calibrate_checkpoint",
    "collect_statistics",
    "conv1d",
    "experts",
    "factorize",
    "factorize_checkpoint",
    "model_card",
    "prune_channels",
    "residual_adapter",
    "share_initializers",
    "to_dense",
    "train_only",
]
