"""Command-line options made of dataclasses and functions: their names, types and documentation, written once."""

import argparse
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError


# `name (`type`, *optional*): text`, indented once in the section `Args:`; what goes on is indented twice.
ENTRY = re.compile(r"^    (\w+)(?: \(((?:[^`()]|`[^`]*`)*)\))?: (.*)$")


@dataclass
class Argument:
    """What a docstring says of an argument.

    Args:
        kind (`Callable`): `int`, `float` or [`size`] where that is its type, else [`value`].
        text (`str`): without types.
    """

    kind: object
    text: str


def documentation(documented):
    """`{name: Argument}` of the section `Args:` of a docstring."""
    _, _, section = inspect.getdoc(documented).partition("Args:\n")
    found, last = {}, None
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        entry = ENTRY.match(line)
        if entry is not None:
            kind = KINDS.get((entry[2] or "").partition(",")[0], value)
            last = found[entry[1]] = Argument(kind, entry[3])
        elif last is not None and line.strip():
            last.text += f" {line.strip()}"
    for argument in found.values():
        # Links to classes mean nothing in a terminal.
        argument.text = re.sub(r"\[(`\w+`)\]", r"\1", argument.text)
    return found


def add_option(parser, name, argument, default=None, dest=None):
    """Add `--name`, which is absent from the parsed arguments unless it is given.

    Args:
        parser (`argparse.ArgumentParser`): or a group.
        name (`str`): as in Python.
        argument ([`Argument`]): its documentation.
        default (*optional*): named in the help, unless it is `None`.
        dest (`str`, *optional*): the attribute of the parsed arguments; `name` by default.
    """
    default = "" if default is None else f" (default: {default})"
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        dest=dest or name,
        type=argument.kind,
        default=argparse.SUPPRESS,
        metavar=argument.kind.__name__.upper(),
        # argparse formats help with %.
        help=f"{argument.text}{default}".replace("%", "%%"),
    )


def add_parameters(parser, function, names):
    """Options for some parameters of a documented function."""
    documented, parameters = documentation(function), inspect.signature(function).parameters
    for name in names:
        add_option(parser, name, documented[name], parameters[name].default)


def labelled(entries):
    """`{label: file}` of entries `[LABEL=]FILE`; a file without a label has its own name.

    Raises:
        ConfigError: two with one label.
    """
    found = {}
    for entry in entries:
        label, _, file = entry.partition("=")
        label, file = (label, file) if file else (Path(label).stem, label)
        if label in found:
            raise ConfigError(f"Two files are called {label!r}, {found[label]} and {file}; give LABEL=FILE.")
        found[label] = file
    return found


def given(arguments, names):
    """`{name: value}` of the options in `names` that were given."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def value(text):
    """A list, a mapping or null in JSON, or the text itself."""
    if text == "null" or text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            # A regular expression may begin so too.
            return text
    return text


def size(text):
    """An integer, or the text itself."""
    return int(text) if text.isdecimal() else text


KINDS = {"`int`": int, "`float`": float, "`str` or `int`": size}
