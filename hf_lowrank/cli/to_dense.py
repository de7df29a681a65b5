"""`optimum-cli lowrank to-dense`."""

import os
import shutil
import tempfile

from ..errors import ConfigError
from ..files import enough_space
from ..integrations import to_dense
from ..integrations.out_of_core import files_beside, is_factorized, load_model, local_folder, read_checkpoint


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("model", help="folder or repository of a factorized checkpoint")
    parser.add_argument("out", help="folder to make; it loads without hf_lowrank")


def run(arguments):
    """Run the command; returns the [`FactorizedCheckpoint`] of the new folder, in which nothing is factorized."""
    folder, out = local_folder(arguments.model), os.path.abspath(arguments.out)
    if not is_factorized(folder):
        raise ConfigError(f"{arguments.model} is not factorized.")
    if os.path.exists(out):
        raise ConfigError(f"OUT is {arguments.out!r}, which is there already; name another folder, or remove it.")
    model = to_dense(load_model(folder))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out), prefix=".to-dense-") as temporary, enough_space(out):
        made = os.path.join(temporary, "made")
        model.save_pretrained(made)
        for path in files_beside(folder):
            shutil.copy(path, made)
        os.replace(made, out)
    return read_checkpoint(out)
