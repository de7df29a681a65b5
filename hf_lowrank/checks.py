"""What an argument is, asked in one way everywhere: `True` is no integer, and NaN no number."""

import math


def is_integer(value, least):
    """Whether `value` is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value):
    """Whether `value` is a finite real number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
