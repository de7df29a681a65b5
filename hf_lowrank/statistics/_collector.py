"""Hooks at the targeted layers that feed accumulators while a model runs."""

import logging
import math
from contextlib import ExitStack, contextmanager

import psutil
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CalibrationError, ResourceError, StatisticsError
from .base import COPIES, GRADIENTS, INPUTS, SAMPLES, STATISTICS
from .masks import UNALIGNED, Masks
from .store import Statistics, check_finite


logger = logging.getLogger(__name__)


class Collector:
    """Accumulates statistics at some sites while the model runs.

    Linears that read the very same tensor (q/k/v, gate/up) share the statistics of their input. Who shares is learned
    in the first batch and must hold in the others.

    Args:
        model (`torch.nn.Module`): the dense model.
        sites (`list[Site]`): where to look.
        names (`list[str]`): registered statistics.
    """

    def __init__(self, model, sites, names):
        self.model = model
        self.sites = {site.name: site for site in sites}
        self.of_inputs = [name for name in names if GRADIENTS not in STATISTICS[name].sees]
        self.of_gradients = [name for name in names if GRADIENTS in STATISTICS[name].sees]
        self.of_labels = self._of_labels()
        self.accumulators = {}
        self.leaders = {}
        self.batches = self.tokens = 0
        self.masks = Masks(model)
        self._seen = {kind for name in names for kind in STATISTICS[name].sees}
        self._pairs = any(INPUTS in STATISTICS[name].sees for name in self.of_gradients)
        self._readers = WeakIdKeyDictionary()
        # Samples in the batches before this one, and in this one.
        self._before = self._samples = 0
        # Of this batch, by site: forward calls whose gradient is due, and what calls with a gradient saw.
        self._due, self._arrived = {}, {}
        self._calls = {}
        self._warned = set()
        self._bytes = 0
        self._available = psutil.virtual_memory().available

    def _of_labels(self):
        kinds = {name: STATISTICS[name].of_labels for name in self.of_gradients}
        if len(set(kinds.values())) > 1:
            raise StatisticsError(
                f"{sorted(kinds)} take gradients of different losses (of labels in the data, of labels from the "
                "model); collect them in two passes."
            )
        return any(kinds.values())

    @contextmanager
    def watching(self):
        """Hooks are in place inside, and gone afterwards whatever happens."""
        with ExitStack() as stack:
            groups = {}
            for site in self.sites.values():
                groups.setdefault(site.owner, []).append(site)
            for group in groups.values():
                stack.enter_context(group[0].kind.watch(self.model, group, self._observe))
            stack.enter_context(self.masks.watching())
            yield self

    def start_batch(self, batch):
        """Take over the masks of a batch."""
        self.batches += 1
        self._samples = self.masks.start_batch(batch)
        self.tokens += self.masks.count(batch)

    def end_batch(self):
        """Account for calls that got no gradient, and forget the tensors of the batch."""
        for name in list(self._arrived):
            self._settle(name)
        self._due = {}
        self._before += self._samples
        self._readers = WeakIdKeyDictionary()

    def combine(self, processes):
        """Account for what other processes have seen; arguments as of `collect`."""
        seen = {"batches": self.batches, "tokens": self.tokens}
        found = processes.gather((seen, self.leaders, self._calls, sorted(self.accumulators)))
        self.batches, self.tokens = (sum(seen[key] for seen, *_ in found) for key in seen)
        self._calls = {}
        for _, leaders, calls, _ in found:
            for name, leader in leaders.items():
                # The same everywhere, since every process sees the same error or none.
                if self.leaders.setdefault(name, leader) != leader:
                    raise StatisticsError(self._unsteady(name))
                self._calls[name] = self._calls.get(name, 0) + calls[name]
        for owner, name in sorted({key for *_, keys in found for key in keys}):
            self._accumulator(owner, name).combine(processes.add)

    def result(self, provenance):
        """The finished [`Statistics`]; accumulators are released as it goes."""
        unseen = sorted(set(self.sites) - set(self.leaders))
        if unseen:
            raise CalibrationError(
                f"{len(unseen)} targeted layers saw no input during calibration, such as {unseen[0]}; give batches "
                "that reach them (an encoder-decoder needs decoder inputs or labels), or exclude them with "
                "`exclude_modules`."
            )
        for name, leader in self.leaders.items():
            if self._calls[name] != self._calls[leader]:
                raise StatisticsError(self._unsteady(name))
        self._add_zero_gradients()
        tensors = {}
        for owner, name in list(self.accumulators):
            tensor = self.accumulators.pop((owner, name)).result()
            check_finite(owner, name, tensor)
            tensors.setdefault(owner, {})[name] = tensor
        return Statistics(self.leaders, tensors, {**provenance, "tokens": self.tokens})

    def _unsteady(self, name):
        return (
            f"{name} read the same input as {self.leaders[name]} at first, but not every time; calibrate on batches "
            "that take the same path through the model, or leave one of them out with `exclude_modules`."
        )

    def _add_zero_gradients(self):
        """A layer the loss does not depend on has a gradient of zero, which is what is recorded, and said."""
        for name in self.of_gradients:
            silent = sorted(site for site in self.sites if (site, name) not in self.accumulators)
            if silent:
                logger.warning(
                    "The loss does not depend on %d targeted layers, such as %s; any rank will do for them.",
                    len(silent),
                    silent[0],
                )
            for owner in silent:
                self._accumulator(owner, name)

    def _accumulator(self, owner, name, device=None):
        """The one that is there, or one that has seen nothing; `device` is that of the weight by default."""
        if (owner, name) not in self.accumulators:
            site = self.sites[owner]
            if device is None:
                device = self.model.get_parameter(site.weight_name).device
                device = torch.device("cpu") if device.type == "meta" else device
            self.accumulators[owner, name] = STATISTICS[name].empty(site.out_features, site.in_features, device)
        return self.accumulators[owner, name]

    def _observe(self, name, inputs, outputs, routed=None):
        # A linear keeps the order of its rows: what holds for its inputs holds for the gradients at its outputs.
        choose = self.masks.chooser(name, inputs, routed)
        origin = {
            SAMPLES: self._samples_of(name, inputs, routed) if SAMPLES in self._seen else None,
            COPIES: _copies_of(inputs, routed) if COPIES in self._seen else None,
        }
        if self.of_gradients:
            self._await_gradient(name, inputs, outputs, choose, origin)
        # A tensor that was changed in place is another input.
        reader, version = self._readers.get(inputs, (None, None))
        if reader is None or version != inputs._version:
            reader = name
            self._readers[inputs] = (name, inputs._version)
        self._calls[name] = self._calls.get(name, 0) + 1
        if self.leaders.setdefault(name, reader) != reader:
            raise StatisticsError(self._unsteady(name))
        if reader == name and self.of_inputs:
            self._update(name, self.of_inputs, self._rows(name, choose, {INPUTS: inputs, **origin}))

    def _await_gradient(self, name, inputs, outputs, choose, origin):
        self._due[name] = self._due.get(name, 0) + 1
        if not outputs.requires_grad:
            # The first layers: everything in front of them is frozen, so that the graph starts here.
            outputs.requires_grad_()
        # Layers with one input hold it once: rows are picked when the gradient is there.
        inputs = inputs.detach() if self._pairs else None
        version = None if inputs is None else inputs._version

        def receive(gradient):
            if inputs is not None and inputs._version != version:
                raise StatisticsError(
                    f"The model changes the input of {name} in place before its gradient is known, so that "
                    f"{self.of_gradients} cannot be collected there; leave it out with `exclude_modules`."
                )
            seen = self._rows(name, choose, {INPUTS: inputs, GRADIENTS: gradient, **origin})
            self._arrived.setdefault(name, []).append(seen)
            if len(self._arrived[name]) == self._due[name]:
                self._settle(name)

        outputs.register_hook(receive)

    def _settle(self, name):
        """Account for all calls of one layer in this batch; layers that share weights are one layer."""
        calls = self._arrived.pop(name)
        seen = calls[0] if len(calls) == 1 else {key: torch.cat([call[key] for call in calls]) for key in calls[0]}
        self._update(name, self.of_gradients, seen)

    def _samples_of(self, name, tensor, routed):
        samples = self.masks.samples(tensor, routed)
        if samples is UNALIGNED:
            raise StatisticsError(
                f"The {math.prod(tensor.shape[:-1])} input rows of {name} cannot be assigned to the {self._samples} "
                "samples of their batch, which the method needs; calibrate with one sample a batch, or leave it out "
                "with `exclude_modules`."
            )
        return samples + self._before

    def _rows(self, name, choose, seen):
        """The rows of everything in `seen` that are real tokens; `None` entries are dropped."""
        rows = {
            key: tensor if key in (SAMPLES, COPIES) else tensor.detach().reshape(-1, tensor.shape[-1])
            for key, tensor in seen.items()
            if tensor is not None
        }
        if choose is UNALIGNED and name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "The inputs of %s, %d rows, cannot be matched with the attention mask: what padding they hold is "
                "counted. Calibrate without padding (equal lengths) to avoid it.",
                name,
                len(next(iter(rows.values()))),
            )
        if choose is None or choose is UNALIGNED:
            return rows
        return {key: tensor[choose.to(tensor.device)] for key, tensor in rows.items()}

    def _update(self, name, statistics, seen):
        for statistic in statistics:
            given = [seen[key] for key in STATISTICS[statistic].sees]
            if (name, statistic) not in self.accumulators:
                self._reserve(self.sites[name], statistic, given[0].device)
            self._accumulator(name, statistic, given[0].device).update(*given)

    def _reserve(self, site, statistic, device):
        """Refuse before the machine starts to swap: accumulators are touched only by and by, so nothing else would."""
        shape = STATISTICS[statistic].shape(site.out_features, site.in_features)
        self._bytes += math.prod(shape) * torch.float64.itemsize
        if device.type == "cpu" and self._bytes > self._available:
            raise ResourceError(
                f"The first {len(self.accumulators) + 1} statistics need {self._bytes / 2**30:.1f} GiB, "
                f"{self._available / 2**30:.1f} GiB of memory are free; calibrate fewer layers at a time with "
                "`target_modules`, or use `method='svd'`."
            )


def _copies_of(inputs, routed):
    if routed is not None:
        return routed[2]
    return torch.zeros(math.prod(inputs.shape[:-1]), dtype=torch.long, device=inputs.device)
