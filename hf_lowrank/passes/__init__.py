"""What can be done to a factorized model without changing what it computes."""

from .fold import fold_order


__all__ = ["fold_order"]
