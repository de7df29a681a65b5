"""What a sweep is of: facts by which a file of another one is told, and calibration data that is read once."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..errors import ConfigError
from ..files import raw
from ..integrations.calibration import as_calibration, check_calibration, described, make_batches
from ..integrations.planning import collect_for, saved_for
from ..integrations.verbs import tokenizer_for
from ..provenance import describe
from ..surgery import all_sites


def as_plain(value, argument):
    """`value` as JSON gives it back, so that it equals what a file holds: lists for tuples, keys that are texts.

    Raises:
        ConfigError: it cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`{argument}`={value!r:.200} cannot be written as JSON ({error}); give texts, finite numbers, lists and "
            "dicts of these."
        ) from error


def facts_of(model, calibration):
    """JSON that says on what a sweep is measured: class, name and dtype of the model, its linears, its calibration.

    Args:
        model (`torch.nn.Module`): dense.
        calibration (`dict`, *optional*): what `checked` says of it.
    """
    lines = [f"{site.name} {site.copies} {site.out_features} {site.in_features}" for site in all_sites(model)]
    facts = {"model": describe(model), "linears": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    return as_plain(facts if calibration is None else {**facts, "calibration": calibration}, "calibration")


def checked(model, recipe, calibration):
    """`(calibration, JSON that describes it)`, with statistics opened and texts read; `(None, None)` if none is read.

    Args:
        model (`torch.nn.Module`): dense.
        recipe ([`Recipe`]): method and seed.
        calibration: as for [`factorize`].

    Raises:
        CalibrationError: data that the method cannot do with, or that cannot be read.
        ConfigError: a `folder` for a method that compares models.
    """
    if not (recipe.needs_statistics or recipe.compares):
        return None, None
    calibration = as_calibration(calibration)
    if isinstance(calibration.data, Iterator):
        # Read for its facts, and again for each choice.
        calibration = replace(calibration, data=list(calibration.data))
    saved = saved_for(recipe, calibration)
    if saved is not None:
        return saved, saved.provenance
    check_calibration(calibration, model)
    if recipe.compares and calibration.folder is not None:
        raise ConfigError(
            f"`folder` of Calibration keeps what belongs to one choice, and `method`={recipe.method.name!r} reads "
            "data for each; leave it unset."
        )
    return calibration, _described(calibration, model, recipe.seed)


def collected(model, names, recipe, calibration):
    """What every choice is given: statistics of the linears `names`, collected here unless they are there already."""
    if calibration is None or not hasattr(calibration, "data") or recipe.compares:
        return calibration
    sites = [site for site in all_sites(model) if site.name in names]
    return collect_for(model, sites, recipe, calibration, tokenizer_for(model, None))


def _described(calibration, model, seed):
    facts, given = {}, calibration.given
    if given is not None:
        _, facts = make_batches(given, model, tokenizer_for(model, None), seed)
        batches = [given.data] if isinstance(given.data, Mapping) else given.data
        if isinstance(batches, (list, tuple)) and all(isinstance(batch, Mapping) for batch in batches):
            # A dataloader may give others each time.
            facts = {**facts, "sha256": _digest(batches)}
    return described(calibration, facts, seed)


def _digest(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            is_tensor = isinstance(value, torch.Tensor)
            digest.update(f"{name} {tuple(value.shape) if is_tensor else value!r}".encode())
            if is_tensor:
                digest.update(raw(value))
    return digest.hexdigest()
