"""`optimum-cli lowrank list`."""

from ..allocation import ALLOCATORS
from ..formats import FORMATS
from ..methods import METHODS
from ..refine import REFINEMENTS
from ..statistics import STATISTICS
from .terminal import Output


REGISTRIES = (METHODS, FORMATS, ALLOCATORS, REFINEMENTS, STATISTICS)


def add_arguments(parser):
    """Arguments of the command: none."""


def run(arguments):
    """Run the command: every registered name with the first line of its documentation."""
    content = {
        registry.kind: {name: (registry[name].__doc__ or "").strip().splitlines()[0] for name in registry.names()}
        for registry in REGISTRIES
    }
    lines = []
    for kind, entries in content.items():
        lines.append(f"{kind}:")
        lines.extend(f"  {name:<14} {text}" for name, text in entries.items())
    return Output("\n".join(lines), content)
