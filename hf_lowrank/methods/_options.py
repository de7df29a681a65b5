"""Options that several methods check alike."""

from ..errors import ConfigError


def check_share(method, name, low=0.0, open_low=False):
    """Refuse an option that is no number in [low, 1], or in (low, 1] with `open_low`."""
    value = getattr(method, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= 1 or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low:g}, 1]"
        raise ConfigError(f"`{name}`={value!r} of {method.name} must be in {bounds}.")


def check_count(method, name, least):
    """Refuse an option that is no integer of at least `least`."""
    value = getattr(method, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"`{name}`={value!r} of {method.name} must be an integer of at least {least}.")
