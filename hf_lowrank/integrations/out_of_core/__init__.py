"""From a dense checkpoint to a factorized one, with the memory of one weight."""

from .finished import FactorizedCheckpoint, read_checkpoint, verify_checkpoint
from .recipe_file import config_from, read_recipe
from .verb import factorize_checkpoint


__all__ = [
    "FactorizedCheckpoint",
    "config_from",
    "factorize_checkpoint",
    "read_checkpoint",
    "read_recipe",
    "verify_checkpoint",
]
