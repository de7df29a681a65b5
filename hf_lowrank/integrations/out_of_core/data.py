"""Calibration data of a checkpoint: checked first, told from other data, turned into statistics block by block."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch

from ...errors import CalibrationError, ConfigError
from ...files import sha256_of
from ...parts import digest_of_batches
from ...statistics import Statistics
from ...statistics.sequential import CURE
from ..calibration import Calibration, check_calibration
from ..planning import saved_for


ONE_PASS = (
    "collect in one pass with hf_lowrank.calibrate_checkpoint(..., in_memory=True) or `optimum-cli lowrank calibrate "
    "--in-memory`, and give the file as `calibration`"
)


def repeatable(calibration):
    """The [`Calibration`] with data that can be read again and again, and told from other data.

    Raises:
        ConfigError: statistics that are in no file.
    """
    data = calibration.data
    if isinstance(data, Statistics):
        path = getattr(data, "path", None)
        if path is None:
            raise ConfigError(
                "`calibration` is statistics in memory, which an interrupted call could not find again; write them "
                "with .save(path) and give the path."
            )
        return replace(calibration, data=path)
    plain = isinstance(data, (str, list, tuple, Mapping, torch.Tensor)) or not isinstance(data, Iterable)
    return calibration if plain else replace(calibration, data=list(data))


def check_data(config, calibration, skeleton, token=None):
    """Refuse calibration data that cannot work, before anything is read.

    Args:
        config ([`LowRankConfig`]): method and allocation.
        calibration ([`Calibration`]): the data.
        skeleton ([`Skeleton`]): of the model.
        token (*optional*): for statistics on the Hub.
    """
    if not config.needs_statistics or not skeleton.plan.sites:
        return
    saved = saved_for(config, calibration, token)
    if saved is None:
        check_calibration(calibration, skeleton.model)
    else:
        saved.check(skeleton.plan.statistics_shapes(config.statistics))


def description(calibration):
    """JSON by which two calls know that they calibrate with the same data."""
    sizes = {f.name: getattr(calibration, f.name) for f in fields(Calibration) if f.name not in ("data", "folder")}
    data = calibration.data
    if isinstance(data, (str, os.PathLike)):
        path = os.fspath(data)
        return {**sizes, "data": sha256_of(path) if os.path.isfile(path) else path}
    if isinstance(data, Mapping):
        data = [data]
    batches = [value if isinstance(value, Mapping) else {"text": value} for value in data]
    return {**sizes, "data": digest_of_batches(batches)}


def gather(origin, config, calibration, folder):
    """Give the session of `config` its statistics: opened, or collected block by block.

    Args:
        origin ([`Source`]): the dense checkpoint.
        config ([`LowRankConfig`]): with a session.
        calibration ([`Calibration`]): the data.
        folder (`str`): for the parts, if `calibration` has no `folder`.
    """
    if not config.needs_statistics:
        return
    with contextlib.ExitStack() as stack, curing(calibration, ONE_PASS):
        origin.calibrate(config, in_folder(calibration, folder), stack)


def in_folder(calibration, folder):
    """The [`Calibration`] with a folder for its parts, which is `folder` if it has none."""
    return calibration if calibration.folder is not None else replace(calibration, folder=folder)


@contextlib.contextmanager
def curing(calibration, cure):
    """Inside, errors name another `cure` than the folder of `calibration`, if that was not the user's choice."""
    try:
        yield
    except CalibrationError as error:
        if calibration.folder is not None or CURE not in str(error):
            raise
        raise CalibrationError(str(error).replace(CURE, cure)) from error
