"""Where a layer stands in its model, told from its name alone: no architecture is known here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Args:
        stack (`str`): what the layer's block is one of: the name in front of the first number; empty without one.
        block (`int`, *optional*): the first number in the name; `None` for a layer outside of repeated blocks.
        projection (`str`): what the layer is in its block: the last part of its name, and as many in front of it as
            tell it from others of the stack. Further numbers do not count, so experts of a block are one projection.
    """

    stack: str
    block: int | None
    projection: str


def places(names):
    """`{name: Place}` of all layers of a model."""
    found, stacks = {}, {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if first is None:
            stack, block, rest = "", None, parts
        else:
            stack, block, rest = ".".join(parts[:first]), int(parts[first]), parts[first + 1 :]
        # The layer may itself be what is numbered.
        rest = tuple(part for part in rest if not part.isdecimal()) or (parts[first - 1] if first else "layer",)
        found[name] = stack, block, rest
        stacks.setdefault((stack, block is None), {})[rest] = None
    labels = {key: _labels(rests) for key, rests in stacks.items()}
    return {
        name: Place(stack, block, labels[stack, block is None][rest]) for name, (stack, block, rest) in found.items()
    }


def _labels(rests):
    """The shortest endings that tell dotted names, given as tuples, from one another."""
    depth = dict.fromkeys(rests, 1)
    while True:
        labels = {rest: ".".join(rest[-size:]) for rest, size in depth.items()}
        shared = list(labels.values())
        longer = [rest for rest in rests if shared.count(labels[rest]) > 1 and depth[rest] < len(rest)]
        if not longer:
            return labels
        for rest in longer:
            depth[rest] += 1
