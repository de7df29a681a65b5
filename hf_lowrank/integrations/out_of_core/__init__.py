"""From a dense checkpoint to a factorized one, with the memory of one weight."""

from .calibration import calibrate_checkpoint
from .finished import FactorizedCheckpoint, is_factorized, read_checkpoint, verify_checkpoint
from .recipe_file import RUN, config_from, read_recipe
from .source import files_beside, load_model, local_folder
from .verb import factorize_checkpoint


__all__ = [
    "RUN",
    "FactorizedCheckpoint",
    "calibrate_checkpoint",
    "config_from",
    "factorize_checkpoint",
    "files_beside",
    "is_factorized",
    "load_model",
    "local_folder",
    "read_checkpoint",
    "read_recipe",
    "verify_checkpoint",
]
