"""What an argument is, asked in one way everywhere: `True` is no integer, and NaN no number."""

import math

from .errors import ConfigError


def is_integer(value, least, most=math.inf):
    """Whether `value` is an integer in `least .. most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value):
    """Whether `value` is a finite real number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name, value, least, owner=None):
    """Refuse an argument that is no integer of at least `least`; `owner` is whose it is, for the message."""
    if not is_integer(value, least):
        raise ConfigError(f"{_called(name, value, owner)} must be an integer of at least {least}.")


def check_seed(seed):
    """Refuse what does not seed every generator: numpy's take 32 bits."""
    if not is_integer(seed, 0, 2**32 - 1):
        raise ConfigError(f"`seed`={seed!r} must be an integer in 0 .. 2**32 - 1.")


def check_number(name, value, low, high=math.inf, owner=None, open_low=False, open_high=False):
    """Refuse an argument that is no number from `low` to `high`, a bound among them unless it is open."""
    if is_number(value):
        above = low < value if open_low else low <= value
        below = value < high if open_high else value <= high
        if above and below:
            return
    if high < math.inf:
        bounds = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    else:
        bounds = f"{'above' if open_low else 'of at least'} {low:g}"
    cure = " It is a string: YAML reads 1e-3 as one, and 1.0e-3 as a number." if isinstance(value, str) else ""
    raise ConfigError(f"{_called(name, value, owner)} must be a number {bounds}.{cure}")


def check_boolean(name, value, owner=None):
    """Refuse an argument that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{_called(name, value, owner)} must be True or False.")


def check_choice(name, value, allowed, owner=None):
    """Refuse an argument that is none of `allowed`."""
    if value not in tuple(allowed):
        raise ConfigError(f"{_called(name, value, owner)} must be one of {list(allowed)}.")


def _called(name, value, owner):
    return f"`{name}`={value!r}" + ("" if owner is None else f" of {owner}")
