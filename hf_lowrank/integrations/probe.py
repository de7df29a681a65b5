"""What a model puts out if some of its weights are factorized, and nothing else is changed."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..allocation import Probe
from ..errors import CalibrationError, ConfigError, NonFiniteError, ResourceError
from ..factorize import site_factors
from ..statistics.collect import check_batch, device_of
from ..statistics.masks import IGNORED, Masks
from .calibration import labels_for
from .progress import Progress


# Bytes of the dense model's outputs that are kept for comparison; beyond it, evenly spaced predictions are.
KEPT_BYTES = 2**30
# Predictions compared at once, which bounds the float32 workspace.
ROWS = 256


class Keeping:
    """Batches that pass by, of which the first stay.

    Args:
        batches (`Iterable[dict]`): calibration batches.
        samples (`int`): sequences to keep, rounded up to whole batches.
    """

    def __init__(self, batches, samples):
        self.batches = batches
        self.kept = []
        self._missing = samples

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            check_batch(batch)
            if self._missing > 0:
                self.kept.append(batch)
                self._missing -= next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))
            yield batch

    def take(self):
        """Keep what is wanted, and read no further."""
        for _ in self:
            if self._missing <= 0:
                break


@dataclass(frozen=True)
class Reading:
    """What one pass over the data gave, means a prediction.

    Args:
        divergence (`float`): of the outputs from the dense model's, in nats.
        loss (`float`, *optional*): where there are labels.
    """

    divergence: float
    loss: float | None


@contextmanager
def probing(model, sites, recipe, statistics, batches):
    """A [`Probe`] of a dense model; inside, the model is in evaluation mode.

    Between two questions and afterwards every weight is what it was, bit for bit: products of factors stand in other
    memory. That memory is one more copy of the weights that a question names; the outputs of the dense model take 1
    GiB at most.

    Args:
        model (`PreTrainedModel`): dense, in memory, with `logits` among its outputs.
        sites (`dict[str, Site]`): the weights that may be asked about.
        recipe ([`Recipe`]): method, compute device and seed.
        statistics ([`Statistics`], *optional*): for methods that need them.
        batches (`list[dict]`): the data.

    Raises:
        CalibrationError: no data, or outputs that are no distribution.
        ResourceError: some weights are not in memory.
        ConfigError: the weights are split over processes.
    """
    _check(model, sites, recipe, batches)
    training = [module for module in model.modules() if module.training]
    model.eval()
    progress = Progress(None, "Probing")
    try:
        yield _ModelProbe(model, sites, recipe, statistics, batches, progress)
    finally:
        progress.close()
        for module in training:
            module.training = True


class _ModelProbe(Probe):
    def __init__(self, model, sites, recipe, statistics, batches, progress):
        super().__init__(recipe.seed)
        self.model = model
        self.sites = sites
        self.recipe = recipe
        self.statistics = statistics
        self.batches = batches
        self.progress = progress
        self._masks = Masks(model)
        self._last = None
        with torch.no_grad():
            self._dense = [predictions.cpu() for predictions, _, _ in self._outputs()]

    def divergence(self, ranks):
        return self._read(ranks).divergence

    def loss(self, ranks):
        loss = self._read(ranks).loss
        if loss is None:
            raise CalibrationError(
                f"`allocation`={self.recipe.allocation.name!r} needs a loss, and {type(self.model).__name__} computes "
                "none from this calibration data; give batches with `labels`, or compare outputs only: 'lems', or "
                "{'name': 'bayes', 'objective': 'kl'}."
            )
        return loss

    @torch.no_grad()
    def _read(self, ranks):
        # Divergence and loss come out of one pass, and are usually asked for together.
        if self._last is None or self._last[0] != ranks:
            with self._replaced(ranks):
                self._last = dict(ranks), self._compare(ranks)
            self.progress.done()
        return self._last[1]

    def _compare(self, ranks):
        divergence = predictions = losses = labels = 0
        for dense, (changed, loss, count) in zip(self._dense, self._outputs(), strict=True):
            for expected, found in zip(dense.split(ROWS), changed.split(ROWS), strict=True):
                divergence += float(_divergences(expected.to(found.device), found).sum())
            predictions += len(dense)
            if count:
                losses += loss * count
                labels += count
        if not divergence < float("inf"):
            raise NonFiniteError(
                f"With {_some(ranks)} factorized, the model's outputs hold NaN or infinite values; load it in float32 "
                "or bfloat16 for calibration, or use an `allocation` without a probe."
            )
        # Rounding may leave a little less than nothing.
        return Reading(max(divergence / predictions, 0.0), losses / labels if labels else None)

    def _outputs(self):
        """`(predictions (rows, classes), mean loss, number of labels)` of every batch."""
        device = device_of(self.model)
        cheaper = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        quota = KEPT_BYTES // len(self.batches)
        for batch in self.batches:
            batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            self._masks.start_batch(batch)
            labels = labels_for(self.model, batch)
            output = self.model(**{**cheaper, **batch, **({} if labels is None else {"labels": labels})})
            logits = output.get("logits")
            if logits is None or logits.shape[-1] == 1:
                raise CalibrationError(
                    f"`allocation`={self.recipe.allocation.name!r} compares predicted distributions, which "
                    f"{type(self.model).__name__} does not put out; load the model with its head, or use 'knapsack'."
                )
            count = 0 if labels is None or output.get("loss") is None else int((labels != IGNORED).sum())
            rows = self._rows(logits)
            stride = -(-len(rows) * rows.shape[-1] * rows.element_size() // quota)
            # A view would keep all rows alive.
            rows = rows[::stride].clone() if stride > 1 else rows
            yield rows, float(output["loss"]) if count else None, count

    def _rows(self, logits):
        mask = self._masks.of_output(logits)
        if mask is not None and mask.shape == logits.shape[:-1]:
            return logits[mask.to(logits.device)]
        return logits.reshape(-1, logits.shape[-1])

    @contextmanager
    def _replaced(self, ranks):
        """Inside, the named weights are the products of their factors, and biases shifted where the method does."""
        dense, shifts = [], []
        try:
            for name, rank in ranks.items():
                site = self.sites[name]
                weight = site.kind.weight(self.model, site)
                factors = site_factors(site, weight, rank, self.recipe, self.statistics)
                for member, own in site.kind.parts(site, factors):
                    parameter = self.model.get_parameter(member.weight_name)
                    dense.append((parameter, parameter.data))
                    parameter.data = parameter.data.clone()
                    for copy, factor in zip(member.kind.weight(self.model, member), own, strict=True):
                        copy.copy_(_product(factor, copy.dtype))
                    if own[0].shift is not None:
                        shifts.append(_shifting(self.model.get_submodule(member.owner), own[0].shift))
            yield
        finally:
            for handle in shifts:
                handle.remove()
            for parameter, data in dense:
                parameter.data = data


def _product(factors, dtype):
    """The product as the factorized layer would give it: factors in `dtype`, computed in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = {name: getattr(factors, name) for name in ("left", "right", "rest")}
    cast = {name: None if part is None else part.to(dtype).to(wide) for name, part in parts.items()}
    return replace(factors, **cast).product()


def _shifting(module, shift):
    """Make a linear add `shift` to its outputs, whether it has a bias or not; the handle ends that."""
    return module.register_forward_hook(lambda _, __, output: output + shift.to(output))


def _divergences(dense, changed):
    """KL(dense || changed) of every row of logits."""
    expected, found = (logits.float().log_softmax(-1) for logits in (dense, changed))
    share = expected.exp()
    # A class that is masked out with -inf has no share; NaN has to come through.
    return torch.where(share == 0, 0, share * (expected - found)).sum(-1)


def _check(model, sites, recipe, batches):
    if not batches:
        raise CalibrationError("`calibration` gave no batch; give at least one text or one batch.")
    if getattr(model, "_device_mesh", None) is not None:
        raise ConfigError(
            f"`allocation`={recipe.allocation.name!r} does not run on a model that is split over processes; "
            "factorize in one process, save, and load the result in parallel."
        )
    members = [member for site in sites.values() for member in site.members]
    if any(model.get_parameter(member.weight_name).is_meta for member in members):
        raise ResourceError(
            f"`allocation`={recipe.allocation.name!r} needs the dense model in memory, and its device map offloads "
            "some weights; use a machine with more memory, or `allocation='knapsack'`."
        )


def _some(ranks):
    return next(iter(ranks)) if len(ranks) == 1 else f"{len(ranks)} weights"
