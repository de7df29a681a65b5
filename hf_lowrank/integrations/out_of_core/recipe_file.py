"""`recipe.yaml`: all that a run was asked for, in a file from which it can be repeated."""

import json
import os
from dataclasses import fields

import yaml

from ...errors import ConfigError
from ...files import writing
from ...recipe import Recipe
from ..calibration import Calibration
from ..config import LowRankConfig, refuse_unknown


RECIPE_FILE = "recipe.yaml"
# Arguments of `factorize_checkpoint` beside the configuration, with their defaults.
RUN = {"dtype": None, "max_shard_size": "50GB"}


def write_recipe(folder, config, calibration, dtype, max_shard_size):
    """Write `recipe.yaml` into `folder`, unless there is calibration data that only this process has.

    Args:
        folder (`str`): of the checkpoint.
        config ([`LowRankConfig`]): how.
        calibration ([`Calibration`]): the data.
        dtype, max_shard_size: as of `factorize_checkpoint`.
    """
    options = config.to_json()
    if config.needs_statistics:
        if not isinstance(calibration.data, (str, os.PathLike)):
            return
        sizes = {
            f.name: getattr(calibration, f.name)
            for f in fields(Calibration)
            if f.name not in ("data", "folder") and getattr(calibration, f.name) != f.default
        }
        data = os.fspath(calibration.data)
        options["calibration"] = {"data": data, **sizes} if sizes else data
    given = {"dtype": None if dtype is None else str(dtype).removeprefix("torch."), "max_shard_size": max_shard_size}
    options.update({name: value for name, value in given.items() if value != RUN[name]})
    with writing(os.path.join(folder, RECIPE_FILE)) as partial, open(partial, "w", encoding="utf-8") as file:
        # YAML knows no tuples.
        yaml.safe_dump(json.loads(json.dumps(options)), file, sort_keys=False, allow_unicode=True)


def read_recipe(path):
    """The options in a YAML file: fields of [`Recipe`], of which `calibration` may be a mapping, and those of `RUN`.

    Raises:
        ConfigError: a file that cannot be read, or keys that mean nothing.
    """
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {os.fspath(path)} cannot be read: {error}") from error
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ConfigError(f"The recipe {os.fspath(path)} must be a mapping of options, not {type(options).__name__}.")
    refuse_unknown(path, options, [*(f.name for f in fields(Recipe)), *RUN])
    if isinstance(options.get("calibration"), dict):
        refuse_unknown(f"`calibration` of {path}", options["calibration"], [f.name for f in fields(Calibration)])
    return options


def config_from(options):
    """`(LowRankConfig, arguments of factorize_checkpoint)` from the options of a recipe."""
    run = {name: options[name] for name in RUN if name in options}
    options = {name: value for name, value in options.items() if name not in RUN}
    return LowRankConfig.from_dict(options), run
