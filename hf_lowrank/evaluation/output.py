"""Files that results go to, looked at before anything is measured."""

import os

from ..errors import ConfigError


def check_output(path, argument):
    """Refuse a file that could not be written in the end, when all is measured.

    Args:
        path (`str`): of the file.
        argument (`str`): what the user called it, with backticks.

    Raises:
        ConfigError: it is a folder, or its folder is not there or takes no files.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path):
        raise ConfigError(f"{argument}={path!r} is a folder; name a file in it.")
    if not os.path.isdir(folder):
        raise ConfigError(f"{argument}={path!r} is to be in a folder that is not there; make {folder!r} first.")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{argument}={path!r} is to be in a folder that takes no files; name another one.")
