"""`optimum-cli lowrank to-dense`."""

import os
import shutil

import transformers

from ..errors import ConfigError
from ..files import PARTIAL, enough_space
from ..integrations import to_dense
from ..integrations.out_of_core import files_beside, is_factorized, local_folder, read_checkpoint


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
    config = transformers.AutoConfig.from_pretrained(folder)
    model = to_dense(getattr(transformers, config.architectures[0]).from_pretrained(folder))
    partial = f"{out}{PARTIAL}"
    try:
        with enough_space(out):
            model.save_pretrained(partial)
            for path in files_beside(folder):
                shutil.copy(path, partial)
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_checkpoint(out)
