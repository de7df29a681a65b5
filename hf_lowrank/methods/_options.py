"""Options that several methods check alike."""

from ..errors import ConfigError


def check_share(method, name, open_low=False):
    """Refuse an option that is no number in [0, 1], or in (0, 1] with `open_low`."""
    value = getattr(method, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (open_low and value == 0):
        raise ConfigError(f"`{name}`={value!r} of {method.name} must be in {'(' if open_low else '['}0, 1].")


def check_count(method, name, least):
    """Refuse an option that is no integer of at least `least`."""
    value = getattr(method, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"`{name}`={value!r} of {method.name} must be an integer of at least {least}.")
