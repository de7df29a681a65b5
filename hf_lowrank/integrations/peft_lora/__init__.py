"""Every PEFT method on factorized layers. PEFT is patched when somebody imports it, never imported from here."""

from .install import install_when_imported
from .residual import residual_adapter
from .trainable import train_only


__all__ = ["install_when_imported", "residual_adapter", "train_only"]
