"""`optimum-cli lowrank report`."""

from pathlib import Path

from ..errors import ConfigError
from ..integrations.out_of_core import is_factorized, load_model, local_folder
from ..reporting import report
from ..reporting.report import HTML, JSON
from .measured import measured
from .options import labelled
from .terminal import Output


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("model", help="folder or repository of a factorized checkpoint; it is loaded whole")
    parser.add_argument("out", help=f"folder of {JSON} and {HTML}")
    parser.add_argument(
        "--dense", metavar="MODEL", help="what it was made from; adds spectra and errors of the dense weights"
    )
    parser.add_argument(
        "--quality",
        nargs="+",
        action="extend",
        metavar="[LABEL=]FILE",
        help="what `evaluate --output` wrote of the dense and of the factorized model, the one to compare with first",
    )


def run(arguments):
    """Run the command; returns where the page is."""
    if not is_factorized(local_folder(arguments.model)):
        raise ConfigError(f"{arguments.model} is not factorized.")
    quality = {label: measured(file, "--quality") for label, file in labelled(arguments.quality or ()).items()}
    dense = None if arguments.dense is None else load_model(arguments.dense)
    found = report(load_model(arguments.model), dense, quality)
    found.save(arguments.out)
    return Output(str(Path(arguments.out, HTML)), found.to_json())
