"""One forward pass over calibration data that accumulates what the methods declared."""

import inspect
import logging
import math
import weakref
from contextlib import ExitStack, contextmanager

import psutil
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CalibrationError, ResourceError, StatisticsError
from .base import STATISTICS
from .store import Statistics, check_finite


logger = logging.getLogger(__name__)

# Arguments that make a pass cheaper without changing what any targeted layer sees.
CHEAPER = {"use_cache": False, "logits_to_keep": 1}


class Collector:
    """Accumulates statistics at the inputs of some sites while the model runs.

    Linears that read the very same tensor (q/k/v, gate/up) share one accumulator. Who shares is learned in the first
    batch and must hold in the others.

    Args:
        model (`torch.nn.Module`): the dense model.
        sites (`list[Site]`): where to look.
        names (`list[str]`): registered statistics.
    """

    def __init__(self, model, sites, names):
        self.model = model
        self.sites = {site.name: site for site in sites}
        self.names = names
        self.accumulators = {}
        self.leaders = {}
        self.tokens = 0
        self._readers = WeakIdKeyDictionary()
        self._masks = Masks(model)
        self._warned = set()
        self._bytes = 0
        self._available = psutil.virtual_memory().available

    @contextmanager
    def watching(self):
        """Hooks are in place inside, and gone afterwards whatever happens."""
        with ExitStack() as stack:
            groups = {}
            for site in self.sites.values():
                groups.setdefault(site.owner, []).append(site)
            for group in groups.values():
                stack.enter_context(group[0].kind.watch(self.model, group, self._observe))
            stack.enter_context(self._masks.watching())
            yield self

    def start_batch(self, batch):
        """Forget the tensors of the batch before and take over the masks of this one."""
        self._readers = WeakIdKeyDictionary()
        self._masks.start_batch(batch)
        self.tokens += self._masks.count(batch)

    def result(self, provenance):
        """The finished [`Statistics`]; accumulators are released as it goes."""
        unseen = sorted(set(self.sites) - set(self.leaders))
        if unseen:
            raise CalibrationError(
                f"{len(unseen)} targeted layers saw no input during calibration, such as {unseen[0]}; give batches "
                "that reach them (an encoder-decoder needs decoder inputs or labels), or exclude them with "
                "`exclude_modules`."
            )
        tensors = {}
        for leader in list(self.accumulators):
            tensors[leader] = {s.name: s.result() for s in self.accumulators.pop(leader)}
            for name, tensor in tensors[leader].items():
                check_finite(leader, name, tensor)
        return Statistics(self.leaders, tensors, {**provenance, "tokens": self.tokens})

    def _reserve(self, inputs):
        """Refuse before the machine starts to swap: accumulators are touched only by and by, so nothing else would."""
        shapes = [STATISTICS[name].shape(1, inputs.shape[-1]) for name in self.names]
        self._bytes += sum(math.prod(shape) for shape in shapes) * torch.float64.itemsize
        if inputs.device.type == "cpu" and self._bytes > self._available:
            raise ResourceError(
                f"The statistics of the first {len(self.accumulators) + 1} inputs need {self._bytes / 2**30:.1f} GiB, "
                f"{self._available / 2**30:.1f} GiB of memory are free; calibrate fewer layers at a time with "
                "`target_modules`, or use `method='svd'`."
            )

    def _observe(self, name, inputs, routed=None):
        reader = self._readers.get(inputs)
        if reader is None:
            self._readers[inputs] = reader = name
        if self.leaders.setdefault(name, reader) != reader:
            raise StatisticsError(
                f"{name} read the same input as {self.leaders[name]} in the first batch, but not in a later one; "
                "calibrate on batches that take the same path through the model."
            )
        if reader != name:
            return
        rows, aligned = self._masks.select(name, inputs, routed)
        if not aligned and name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "The inputs of %s, %s, cannot be matched with the attention mask: padding is counted there. "
                "Calibrate without padding (equal lengths) to avoid it.",
                name,
                tuple(inputs.shape),
            )
        if name not in self.accumulators:
            self._reserve(inputs)
            self.accumulators[name] = [STATISTICS[s](inputs.shape[-1], inputs.device) for s in self.names]
        for statistic in self.accumulators[name]:
            statistic.update(rows)


class Masks:
    """Which rows of an activation are real tokens: the attention masks of a batch, matched to activations by shape."""

    def __init__(self, model):
        self._decoder = set()
        self._encoder = None
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            decoder = model.get_decoder()
            prefix = next(name for name, module in model.named_modules() if module is decoder)
            self._decoder = {f"{prefix}.{name}" for name, _ in decoder.named_modules()}
            self._encoder = model.get_encoder()
        self._encoded = lambda: None
        self._first = self._second = None

    @contextmanager
    def watching(self):
        """Remembers the encoder's output inside, which cross-attention reads under the encoder's mask."""
        if self._encoder is None:
            yield
            return

        def remember(_, __, output):
            self._encoded = weakref.ref(output[0])

        handle = self._encoder.register_forward_hook(remember)
        try:
            yield
        finally:
            handle.remove()

    def start_batch(self, batch):
        """Read the masks of one batch."""
        self._first = _as_mask(batch.get("attention_mask"))
        self._second = _as_mask(batch.get("decoder_attention_mask"))
        labels = batch.get("labels")
        if self._decoder and self._second is None and labels is not None and labels.ndim == 2:
            self._second = labels != -100

    def count(self, batch):
        """Real tokens of the batch, or its samples where it has no token ids."""
        if self._first is not None:
            return int(self._first.sum())
        ids = batch.get("input_ids")
        first = ids if ids is not None else next(iter(batch.values()))
        return ids.numel() if ids is not None else first.shape[0]

    def select(self, name, inputs, routed=None):
        """`(rows, aligned)`: the real rows `(tokens, in)`, and whether padding is known to be gone from them.

        `routed` is `(token index of each row, number of tokens)` where a router has picked and sorted the rows.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        if routed is not None:
            return self._select_routed(flat, *routed)
        masks = [self._first, self._second]
        if name in self._decoder and inputs is not self._encoded():
            masks.reverse()
            if masks[0] is None:
                return flat, True
        for mask in masks:
            if mask is None:
                continue
            if inputs.shape[:-1] == mask.shape or (inputs.ndim == 2 and len(flat) == mask.numel()):
                return (flat if mask.all() else flat[mask.flatten().to(flat.device)]), True
        # One row a sample (a pooler), or another modality with its own length: nothing to remove.
        padded = any(mask is not None and not mask.all() for mask in masks)
        per_sample = any(mask is not None and inputs.ndim == 2 and len(flat) == mask.shape[0] for mask in masks)
        return flat, per_sample or not padded or inputs.ndim > 2

    def _select_routed(self, rows, token_index, tokens):
        masks = [mask for mask in (self._first, self._second) if mask is not None and not mask.all()]
        for mask in masks:
            if mask.numel() == tokens:
                return rows[mask.flatten().to(rows.device)[token_index]], True
        return rows, not masks


def _as_mask(mask):
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def device_of(model):
    """The device inputs go to: that of the first parameter that holds data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def collect(model, sites, names, batches, provenance=None, progress=None):
    """Run `model` over `batches` and return the statistics at the inputs of `sites`.

    Args:
        model (`torch.nn.Module`): in memory or dispatched by accelerate; put into eval mode for the pass and back.
        sites (`list[Site]`): the linears to look at.
        names (`list[str]`): registered statistics to accumulate.
        batches (`Iterable[dict]`): keyword arguments of the model's forward, tensors of any modality.
        provenance (`dict`, *optional*): what to record about the data.
        progress (`Callable`, *optional*): wraps the iterable, as tqdm does.

    Returns:
        [`Statistics`]

    Raises:
        CalibrationError: no batch at all, or layers that no batch reaches.
        StatisticsError: activations that are NaN or infinite.
    """
    accepted = inspect.signature(model.forward).parameters
    cheaper = {key: value for key, value in CHEAPER.items() if key in accepted}
    device = device_of(model)
    collector = Collector(model, sites, names)
    training = model.training
    model.eval()
    count = 0
    try:
        with torch.no_grad(), collector.watching():
            for batch in progress(batches) if progress else batches:
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                collector.start_batch(batch)
                model(**{**cheaper, **batch})
                count += 1
    finally:
        model.train(training)
    if count == 0:
        raise CalibrationError("`calibration` gave no batch; give at least one text or one batch.")
    return collector.result(provenance or {})
