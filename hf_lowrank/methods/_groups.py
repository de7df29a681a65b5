"""Options of methods that factorize several weights as one."""

from ..checks import is_integer
from ..errors import ConfigError


def checked_groups(method):
    """`joint_groups` of `method` as a tuple of tuples.

    Raises:
        ConfigError: it is anything but a list of lists of two or more different names.
    """
    groups = method.joint_groups
    if isinstance(groups, (list, tuple)) and all(_is_group(group) for group in groups):
        return tuple(tuple(group) for group in groups)
    raise ConfigError(
        f"`joint_groups`={groups!r} of {method.name} must be a list of groups, each a list of two or more different "
        "module names or dotted suffixes, such as [['q_proj', 'k_proj', 'v_proj'], ['gate_proj', 'up_proj']]."
    )


def check_share_layers(method, what):
    """Refuse `share_layers` of `method` that is no number of blocks with one `what`."""
    if not is_integer(method.share_layers, 1):
        raise ConfigError(
            f"`share_layers`={method.share_layers!r} of {method.name} must be an integer of at least 1, the number of "
            f"neighbouring blocks with one {what}."
        )


def _is_group(group):
    names = isinstance(group, (list, tuple)) and all(isinstance(name, str) and name for name in group)
    return names and len(set(group)) == len(group) >= 2
