"""What all commands share: how one is found and run, what it prints, and how it ends."""

import contextlib
import importlib
import json
import sys

from ..errors import LowRankError


def add_arguments(command, parser):
    """Give `parser` the arguments of a command."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    _module(command).add_arguments(parser)


def run(command, arguments):
    """Run a command and print its result, which is all that goes to stdout; leaves with 1 if it fails.

    Args:
        command (`str`): its name.
        arguments (`argparse.Namespace`): as parsed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = _module(command).run(arguments)
    except (LowRankError, OSError) as error:
        # Files, network and Hub: as foreseeable as errors of the library, and a traceback helps with neither.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("Interrupted.", file=sys.stderr)
        # What a shell says of a command that a key has ended.
        raise SystemExit(130) from error
    print(json.dumps(result.to_json(), indent=2) if arguments.json else result)


class Output:
    """A result: text for people, JSON for programs.

    Args:
        text (`str`): printed.
        content: printed with `--json`.
    """

    def __init__(self, text, content):
        self.text = text
        self.content = content

    def to_json(self):
        """The content."""
        return self.content

    def __str__(self):
        return self.text


def _module(command):
    return importlib.import_module(f".{command.replace('-', '_')}", __package__)
