"""`optimum-cli lowrank factorize`."""

from ..integrations import factorize_checkpoint
from ..integrations.out_of_core import RUN, config_from
from .options import add_parameters, given
from .recipe import add_recipe, recipe_from


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("model", help="folder or repository of the dense checkpoint")
    parser.add_argument("out", help="folder to make; run the command again if it was interrupted")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    add_parameters(parser, factorize_checkpoint, RUN)
    add_recipe(parser)


def run(arguments):
    """Run the command; returns the [`FactorizedCheckpoint`]."""
    config, options = config_from({**recipe_from(arguments), **given(arguments, RUN)})
    if arguments.revision is not None:
        options["revision"] = arguments.revision
    return factorize_checkpoint(arguments.model, arguments.out, config, **options)
