"""`optimum-cli lowrank inspect`."""

from ..integrations.out_of_core import is_factorized, local_folder, read_checkpoint
from ..reporting import spectra
from .options import add_parameters, given


OPTIONS = ("energy",)


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument(
        "model",
        help="folder or repository; of a dense checkpoint, spectra are shown, of a factorized one, its factors",
    )
    add_parameters(parser, spectra, OPTIONS)


def run(arguments):
    """Run the command; returns [`Spectra`], or the [`FactorizedCheckpoint`]."""
    folder = local_folder(arguments.model)
    if is_factorized(folder):
        return read_checkpoint(folder)
    return spectra(folder, **given(arguments, OPTIONS))
