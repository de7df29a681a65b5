"""`optimum-cli lowrank calibrate`."""

import os

from ..errors import CalibrationError
from ..integrations import calibrate_checkpoint
from ..integrations.out_of_core import config_from
from .options import add_parameters, given
from .recipe import add_recipe, recipe_from
from .terminal import Output


OPTIONS = ("method", "allocation", "target_modules", "exclude_modules", "calibration", "seed")


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("model", help="folder or repository of the dense checkpoint")
    parser.add_argument("out", help="file to make, which `--calibration` of `factorize` reads")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="collect everything in one pass, with the model and all statistics in memory, instead of block by block",
    )
    add_parameters(parser, calibrate_checkpoint, ["dtype"])
    add_recipe(parser, OPTIONS)


def run(arguments):
    """Run the command."""
    if not arguments.out.endswith(".safetensors"):
        raise CalibrationError(f"OUT is {arguments.out!r}; the name of a statistics file ends in .safetensors.")
    config, _ = config_from(recipe_from(arguments))
    hub = {} if arguments.revision is None else {"revision": arguments.revision}
    dtype = given(arguments, ["dtype"])
    statistics = calibrate_checkpoint(arguments.model, arguments.out, config, arguments.in_memory, **dtype, **hub)
    size = os.path.getsize(arguments.out)
    content = {
        "file": arguments.out,
        "bytes": size,
        "modules": len(statistics.leaders),
        "statistics": list(config.statistics),
        "provenance": statistics.provenance,
    }
    text = (
        f"{arguments.out}: {', '.join(content['statistics'])} of {content['modules']} modules, {size / 2**20:.1f} MiB"
    )
    return Output(text, content)
