"""One pass over calibration data that accumulates what the methods declared."""

import inspect
from collections.abc import Mapping
from contextlib import contextmanager

import torch

from ..errors import CalibrationError
from ._collector import Collector
from ._fisher_loss import fisher_backward, labelled_backward


# Arguments that make a pass cheaper without changing what any targeted layer sees.
CHEAPER = {"use_cache": False, "logits_to_keep": 1}
NO_BATCH = "`calibration` gave no batch; give at least one text or one batch."


def device_of(model):
    """The device inputs go to: that of the first parameter that holds data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def check_batch(batch):
    """Refuse a calibration batch that no model could read."""
    if not isinstance(batch, Mapping) or not any(isinstance(value, torch.Tensor) for value in batch.values()):
        raise CalibrationError(
            f"A calibration batch is {type(batch).__name__}, not a dict of tensors; give texts, or dicts as a "
            "tokenizer or processor makes them with `return_tensors='pt'`."
        )


def call_arguments(model, batch, all_positions=False):
    """Keyword arguments of a forward pass of `model` over `batch`: on its device, and as cheap as they can be.

    Args:
        model (`torch.nn.Module`): its forward says what it accepts.
        batch (`dict`): as the user gave it.
        all_positions (`bool`, defaults to `False`): whether predictions of all positions are wanted.

    Raises:
        CalibrationError: `batch` is not a dict of tensors.
    """
    check_batch(batch)
    device, accepted = device_of(model), inspect.signature(model.forward).parameters
    # With labels, the model computes a loss over all positions.
    skipped = ("logits_to_keep",) if all_positions or "labels" in batch else ()
    cheaper = {key: value for key, value in CHEAPER.items() if key in accepted and key not in skipped}
    return {**cheaper, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}}


@contextmanager
def prepared(model, backward):
    """Inside, `model` is in eval mode, and gradients flow if `backward`, but no parameter asks for one.

    The backward pass is then no dearer than a forward pass.
    """
    training = [module for module in model.modules() if module.training]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(backward):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def run_backward(collector, output, batch, generator):
    """Run the loss that the statistics of `collector` are of backward."""
    if not (collector.of_labels and labelled_backward(output, batch)):
        problem_type = getattr(getattr(collector.model, "config", None), "problem_type", None)
        fisher_backward(output, collector.masks.of_output, generator, problem_type)


def collect(model, sites, names, batches, provenance=None, progress=None, seed=0, processes=None):
    """Run `model` over `batches` and return statistics at `sites`.

    Args:
        model (`torch.nn.Module`): in memory or dispatched by accelerate; put into eval mode for the pass and back.
        sites (`list[Site]`): the linears to look at.
        names (`list[str]`): registered statistics to accumulate; those that see gradients make the pass run backward.
        batches (`Iterable[dict]`): keyword arguments of the model's forward, tensors of any modality.
        provenance (`dict`, *optional*): what to record about the data.
        progress (`Callable`, *optional*): wraps the iterable, as tqdm does.
        seed (`int`, defaults to 0): of the labels that are drawn from the model.
        processes (*optional*): others that collect from batches of their own, as a [`Processes`] has them; what
            comes back is of all batches, the same in each.

    Returns:
        [`Statistics`]

    Raises:
        CalibrationError: no batch at all, or layers that no batch reaches.
        StatisticsError: activations that are NaN or infinite, rows that cannot be assigned to samples, or statistics
            that need different losses.
        ResourceError: more memory is needed than is free.
    """
    collector = Collector(model, sites, names)
    backward = bool(collector.of_gradients)
    generator = torch.Generator(device_of(model)).manual_seed(seed + (processes.index if processes else 0))
    with prepared(model, backward), collector.watching():
        for batch in progress(batches) if progress else batches:
            batch = call_arguments(model, batch, all_positions=backward)
            collector.start_batch(batch)
            output = model(**batch)
            if backward:
                run_backward(collector, output, batch, generator)
            collector.end_batch()
    if processes:
        collector.combine(processes)
    if not collector.batches:
        raise CalibrationError(NO_BATCH)
    return collector.result(provenance or {})
