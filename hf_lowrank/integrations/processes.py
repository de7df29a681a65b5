"""Processes that accelerate has started, each with a whole model, sharing calibration data out among themselves."""

import itertools
from dataclasses import replace

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import gather_object

from ..errors import CalibrationError, ConfigError
from ..sharding import refuse_fsdp, refuse_sharded


class Processes:
    """What a collection has to know about the others.

    Args:
        accelerator (`accelerate.Accelerator`): of this process.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def share(self, batches):
        """Every n-th of `batches`, this process's own."""
        return itertools.islice(batches, self.index, None, self.count)

    def samples(self, calibration):
        """`calibration` with this process's share of the sequences, which may be none."""
        return replace(calibration, samples=len(range(self.index, calibration.samples, self.count)))

    def add(self, tensor):
        """The sum over all processes of a tensor."""
        return self._accelerator.reduce(tensor.to(self._accelerator.device), "sum").to(tensor.device)

    def gather(self, found):
        """A list of what each process gives: JSON-like things."""
        return gather_object([found])


def processes_for(accelerator, model, calibration):
    """`(the processes or None, the model inside any wrapper)`, with what cannot be shared out refused.

    Raises:
        ConfigError: not an `Accelerator`; parts of a folder, which one process keeps.
        CalibrationError: batches that are shared out already, or fewer sequences to sample than processes.
        TargetError: weights that are split over the processes.
    """
    if accelerator is None:
        return None, model
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(f"`accelerator`={accelerator!r} must be an accelerate.Accelerator, or None.")
    if calibration.folder is not None:
        raise ConfigError(
            "`folder` of Calibration keeps the parts of one process; leave out `accelerator`, or `folder`."
        )
    if isinstance(calibration.data, (DataLoaderShard, DataLoaderDispatcher)):
        raise CalibrationError(
            "`calibration` went through accelerator.prepare(), so that each process sees its own batches already; "
            "give the DataLoader as it was, the same in every process."
        )
    if 0 < calibration.drawn < accelerator.num_processes:
        raise CalibrationError(
            f"`samples` of Calibration asks the model for {calibration.drawn} sequences, fewer than the "
            f"{accelerator.num_processes} processes; start fewer, or take more samples."
        )
    what = "statistics of all processes"
    refuse_fsdp(model, what)
    refuse_sharded(dict(model.named_parameters()), what)
    return Processes(accelerator), accelerator.unwrap_model(model)
