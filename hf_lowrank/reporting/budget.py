"""What a recipe asked for, and what came of it, in one unit."""

from dataclasses import dataclass

from ..recipe import BUDGETS
from ..surgery import pattern_for


@dataclass(frozen=True)
class Budget:
    """A budget as it was asked for and as it stands.

    Args:
        name (`str`, *optional*): the argument of [`LowRankConfig`] that gave it; `None` where the recipe is not known.
        asked (`int` or `float`, *optional*): its value.
        reached (`int` or `float`, *optional*): the same of the model as it stands, without the layers that
            `rank_pattern` sets apart, unless the whole model was asked about. For `target_bytes`, without the headers
            of files; for `rank`, the largest; for `energy`, the smallest share. `None` where the model does not tell,
            as for a budget of time.
        counted (`int`): layers that count.
        pinned (`int`): layers that `rank_pattern` sets apart.
    """

    name: str | None
    asked: int | float | None
    reached: int | float | None
    counted: int
    pinned: int


def budget_of(recipe, layers, size):
    """The [`Budget`] of a factorized model.

    Args:
        recipe (`dict`, *optional*): as in its config.
        layers (`list[Layer]`): its targets.
        size (`int`): bytes of the whole model.
    """
    recipe = recipe or {}
    name = next((name for name in BUDGETS if name in recipe), None)
    pinned = _pinned(layers, recipe.get("rank_pattern", {}))
    free = [layer for layer in layers if layer.name not in pinned]
    return Budget(name, recipe.get(name), _reached(name, recipe, free, size), len(free), len(pinned))


def _pinned(layers, pattern):
    """Layers with a rank of their own, and those that share a basis with one."""
    hits = {layer.name for layer in layers if pattern_for(layer.name, pattern) is not None}
    groups = {layer.basis or layer.name for layer in layers if layer.name in hits}
    return hits | {layer.name for layer in layers if (layer.basis or layer.name) in groups}


def _reached(name, recipe, layers, size):
    allocation = recipe.get("allocation")
    if isinstance(allocation, dict) and allocation.get("cost") == "latency":
        return None
    if name == "target_bytes":
        return size
    if name == "target_params":
        return sum(layer.parameters for layer in layers)
    if name == "param_ratio":
        whole = sum(layer.dense_parameters for layer in layers)
        return sum(layer.parameters for layer in layers) / whole if whole else None
    if name == "rank":
        return max((layer.rank for layer in layers if layer.rank is not None), default=None)
    if name == "energy":
        return min((1 - layer.relative_error**2 for layer in layers if layer.relative_error is not None), default=None)
    return None
