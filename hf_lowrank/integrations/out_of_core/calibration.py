"""Statistics of a checkpoint, into a file."""

import os
import shutil

from ...statistics import Statistics
from ..calibration import as_calibration, check_calibration
from ..session import Session
from ..verbs import collect_statistics
from .data import curing, in_folder
from .source import Source, check_path


def calibrate_checkpoint(source, path, config, in_memory=False, dtype=None, **hub):
    """Collect what method and allocation of `config` need to know, of a checkpoint, into a file.

    Statistics are collected block by block, with weights that stay in the files of `source` where their dtype is kept.
    A call that is interrupted goes on where it was when it is repeated.

    Args:
        source (`str`): a folder, or a repository on the Hub, with a dense model.
        path (`str`): the file, whose name ends in `.safetensors`. It appears at the end; until then, what is finished
            is in `path + ".parts"`, unless the calibration has a `folder`.
        config ([`LowRankConfig`]): method, allocation, targets, calibration data and seed are read.
        in_memory (`bool`, defaults to `False`): collect everything in one pass instead, in memory; also for models
            without repeated blocks.
        dtype (*optional*): load in this dtype; that of the checkpoint by default.
        hub (*optional*): `revision`, `token`, `cache_dir`, `local_files_only`: where `source` is on the Hub.

    Returns:
        [`Statistics`] that are read from the file.

    Raises:
        CheckpointError: the source cannot be read.
        CalibrationError: data that does not fit the model, or a method that needs none.
    """
    check_path("path", path)
    origin = Source(source, dtype, **hub)
    calibration, config = as_calibration(config.calibration), config.again()
    config.calibration, config.session = None, Session()
    check_calibration(calibration, origin.rehearse(config).model)
    folder = f"{os.fspath(path)}.parts"
    with curing(calibration, "give `in_memory=True` (on the command line, `--in-memory`)"):
        statistics = collect_statistics(
            origin.load(),
            calibration if in_memory else in_folder(calibration, folder),
            method=config.method,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            seed=config.seed,
            allocation=config.allocation if config.allocates else None,
        )
    statistics.save(path)
    shutil.rmtree(folder, ignore_errors=True)
    return Statistics.load(path)
