"""Command-line options made of dataclasses and functions: their names, types and documentation, written once."""

import argparse
import inspect
import json
import re
from types import NoneType
from typing import get_args


# `name (`type`, *optional*): text`, indented once in the section `Args:`; what goes on is indented twice.
ENTRY = re.compile(r"^    (\w+)(?: \(.*?\))?: (.*)$")


def documentation(documented):
    """`{argument: text}` of the section `Args:` of a docstring, without the types in parentheses."""
    _, _, section = inspect.getdoc(documented).partition("Args:\n")
    found, name = {}, None
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        entry = ENTRY.match(line)
        if entry is not None:
            name, found[entry[1]] = entry[1], entry[2]
        elif name is not None and line.strip():
            found[name] += f" {line.strip()}"
    # Links to classes mean nothing in a terminal.
    return {name: re.sub(r"\[(`\w+`)\]", r"\1", text) for name, text in found.items()}


def add_option(parser, name, annotation, text, default=None, dest=None):
    """Add `--name`, which is absent from the parsed arguments unless it is given.

    Args:
        parser (`argparse.ArgumentParser`): or a group.
        name (`str`): as in Python.
        annotation (`type`): decides what a value is: `int`, `float`, else text or JSON.
        text (`str`): its documentation.
        default (*optional*): named in the help, unless it is `None`.
        dest (`str`, *optional*): the attribute of the parsed arguments; `name` by default.
    """
    kinds = set(get_args(annotation) or (annotation,)) - {NoneType}
    kind = kinds.pop() if kinds in ({int}, {float}) else value
    default = "" if default is None else f" (default: {default})"
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        dest=dest or name,
        type=kind,
        default=argparse.SUPPRESS,
        metavar=kind.__name__.upper(),
        # argparse formats help with %.
        help=f"{text}{default}".replace("%", "%%"),
    )


def add_parameters(parser, function, names):
    """Options for some parameters of a documented function."""
    texts, parameters = documentation(function), inspect.signature(function).parameters
    for name in names:
        default = parameters[name].default
        annotation = type(default) if isinstance(default, (int, float)) else object
        add_option(parser, name, annotation, texts[name], default)


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
