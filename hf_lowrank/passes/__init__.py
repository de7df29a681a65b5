"""What can be done to a factorized model without changing what it computes."""

from .fold import fold_order
from .merge import merge_linear


__all__ = ["fold_order", "merge_linear"]
