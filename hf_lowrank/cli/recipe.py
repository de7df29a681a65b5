"""The options of a recipe: every field of `Recipe` and `Calibration`, and the file that they are read from."""

from dataclasses import MISSING, fields

from ..integrations import Calibration
from ..integrations.out_of_core import read_recipe
from ..recipe import BUDGETS, Recipe
from .options import add_option, documentation, given


# Apart from other arguments of the same names.
RECIPE, CALIBRATION = "recipe_{}", "calibration_{}"


def add_recipe(parser, names=None):
    """Add the options of a recipe.

    Args:
        parser (`argparse.ArgumentParser`): of a command.
        names (`list[str]`, *optional*): the fields of [`Recipe`] that the command uses; all by default.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="a recipe.yaml with the options below; those on the command line win over it"
    )
    group = parser.add_argument_group("recipe", "Lists and mappings are given as JSON, and so are a method's options.")
    documented = documentation(Recipe)
    for f in fields(Recipe):
        if names is None or f.name in names:
            add_option(group, f.name, documented[f.name], _default(f), RECIPE.format(f.name))
    group = parser.add_argument_group(
        "calibration data", "Collected block by block beside OUT, unless said otherwise."
    )
    documented = documentation(Calibration)
    for f in fields(Calibration):
        if f.name != "data":
            name = CALIBRATION.format(f.name)
            add_option(group, name, documented[f.name], _default(f), name)


def recipe_from(arguments):
    """The options of a recipe: those of the file, and over them those of the command line.

    Raises:
        ConfigError: the file cannot be read, or has unknown keys.
    """
    options = {} if arguments.config is None else read_recipe(arguments.config)
    typed, sizes = _typed(arguments, Recipe, RECIPE), _typed(arguments, Calibration, CALIBRATION)
    if not typed.keys().isdisjoint(BUDGETS):
        # A budget on the command line is meant in place of the one in the file.
        options = {name: value for name, value in options.items() if name not in BUDGETS}
    calibration = options.pop("calibration", {})
    if not isinstance(calibration, dict):
        calibration = {"data": calibration}
    data = typed.pop("calibration", {})
    calibration.update(data if isinstance(data, dict) else {"data": data})
    calibration.update(sizes)
    return {**options, **typed, **({"calibration": calibration} if calibration else {})}


def _typed(arguments, cls, pattern):
    """`{field: value}` of the fields of `cls` that were given."""
    found = given(arguments, [pattern.format(f.name) for f in fields(cls)])
    return {f.name: found[pattern.format(f.name)] for f in fields(cls) if pattern.format(f.name) in found}


def _default(f):
    return None if f.default is MISSING else f.default
