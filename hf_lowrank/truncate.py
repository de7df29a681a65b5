"""Lower the rank of a factorized model, or store it in another format."""

import math
import os
from dataclasses import replace

from torch import nn

from .checks import is_integer
from .errors import ConfigError, LowRankError, RankError, TargetError
from .formats import FORMATS, DenseLinear, FormatLinear, LinearFace, check_rank, exact_factors
from .kinds import succeed
from .methods import METHODS, Factors
from .rewrite import check_rewritable, replace_factors
from .statistics import Statistics
from .surgery import factorized, matches


# Singular values below this part of the norm of a product are rounding in float64.
ROUNDING = 1e-12


def truncate(model, rank=None, rank_pattern=None, format=None, method="svd", statistics=None):
    r"""Approximate every factorized weight at a lower rank, in place; say what is lost.

        min_{rank k} objective(W' - W''),    relative error = sqrt(objective(W' - W'') / objective(W')),

    with the objective of `method`: the Frobenius norm for `"svd"`, the output error on calibration inputs for
    `"whitened_svd"`. It is what follows merging, which appends factors: ranks grow by the rank of every adapter. What
    a format holds beside two factors stays as it is, unless the format changes: then the rank is that of the whole
    weight. Layers that [`prune_channels`] has made narrower are no factors, and are left alone unless both a rank and
    a format are given.

    Args:
        model (`torch.nn.Module`): factorized, without adapters.
        rank (`int`, *optional*): largest rank to keep, at least 1; layers of lower rank stay as they are. Without,
            only those of `rank_pattern` get another weight, and a new `format` holds the present one at its numerical
            rank, which may be high where there was more than two factors.
        rank_pattern (`dict[str, int]`, *optional*): such ranks by name or dotted suffix, before `rank`.
        format (`str`, *optional*): a registered format to store every layer in; the present one by default.
        method (`str` or [`Method`], defaults to `"svd"`): decides what counts as an error.
        statistics ([`Statistics`] or `str`, *optional*): for methods that need them, of the dense model; or the file
            that holds them.

    Returns:
        `dict[str, float]`: the relative error of each layer that changed.

    Raises:
        RankError: a rank below 1.
        ConfigError: a method that cannot lower ranks.
        TargetError: no factorized layer, a pattern that matches none, or a layer that cannot change.
        StatisticsError: statistics of another model or method.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"`model`={model!r} must be a factorized model, not {type(model).__name__}.")
    method = METHODS.build(method)
    unfit = (
        (method.initialises, "starts from scratch"),
        (method.shifts, "shifts biases"),
        (method.only_format, f"makes what only layers of format {method.format!r} hold"),
        (method.statistics and statistics is None, "needs `statistics`"),
    )
    for found, why in unfit:
        if found:
            raise ConfigError(f"`method`={method.name!r} {why}; choose 'svd', or 'whitened_svd' with statistics.")
    statistics = Statistics.load(statistics) if isinstance(statistics, (str, os.PathLike)) else statistics
    target = None if format is None else FORMATS.listed(format)
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FormatLinear) and (target is not None or not isinstance(layer, DenseLinear))
    }
    if not found:
        kind = (
            "only factorized experts and convolutions, whose ranks are fixed, or pruned layers"
            if factorized(model)
            else "no factorized layer"
        )
        raise TargetError(f"The model has {kind}; nothing can be truncated.")
    ranks = _ranks(found, rank, {} if rank_pattern is None else rank_pattern)
    lenders = {id(layer.lender) for layer in found.values() if getattr(layer, "lender", None) is not None}
    made = {}
    for name, layer in found.items():
        stays = target in (None, FORMATS[layer.name])
        if stays and ranks.get(name, layer.rank) >= layer.rank or isinstance(layer, DenseLinear) and name not in ranks:
            continue
        _check(name, layer, lenders)
        stats = statistics.get(name, method.statistics) if method.statistics else {}
        try:
            factors = None if stays else _as_it_is(layer)
            if factors is None or ranks.get(name, math.inf) < max(factors.left.shape[1], layer.rank):
                factors = _lower(layer, ranks[name], layer.rest() if stays else None, method, stats)
            made[name] = factors
        except LowRankError as error:
            raise type(error)(f"{name}: {error}") from error
    for name, factors in made.items():
        if target in (None, FORMATS[found[name].name]):
            replace_factors(found[name], factors.left, factors.right, rest=factors.rest)
        else:
            succeed(model, name, _in_format(target, found[name], factors))
    return {name: factors.relative_error for name, factors in made.items()}


def _ranks(layers, rank, pattern):
    if not isinstance(pattern, dict):
        raise ConfigError(f"`rank_pattern`={pattern!r} of truncate must be a dict of ranks by name or dotted suffix.")
    for value in (rank, *pattern.values()):
        if value is not None and not is_integer(value, 1):
            raise RankError(f"`rank`={value!r} of truncate must be an integer of at least 1.")
    ranks = {} if rank is None else dict.fromkeys(layers, rank)
    for entry, value in pattern.items():
        hits = [name for name in layers if matches([entry], name)]
        if not hits:
            raise TargetError(
                f"`rank_pattern` has {entry!r}, which matches no factorized layer; there are {len(layers)}, such as "
                f"{next(iter(layers))}."
            )
        ranks.update(dict.fromkeys(hits, value))
    return ranks


def _check(name, layer, lenders):
    if isinstance(layer, LinearFace):
        raise TargetError(f"{name} carries adapters; call `merge_and_unload()` or `unload()` first.")
    if getattr(layer, "lender", None) is not None or id(layer) in lenders:
        raise TargetError(
            f"{name} shares its basis with other layers, whose ranks are one; factorize the dense model at that rank."
        )
    check_rewritable(layer)


def _as_it_is(layer):
    """Factors of the whole weight, at its numerical rank."""
    # The product of factors in a lower precision is exact in float64, however coarse they are.
    return Factors(*exact_factors(layer.exact_weight(), ROUNDING), 0.0)


def _lower(layer, rank, rest, method, stats):
    """Factors of what `layer` has beside `rest`, and their error as a part of the whole weight."""
    whole = layer.exact_weight()
    stats = {key: value.to(whole.device) for key, value in stats.items()}
    product = whole if rest is None else whole - rest
    factors = method.factorize(product, min(rank, *whole.shape), stats)
    if rest is None:
        return factors
    share = method.objective(product, stats) / method.objective(whole, stats)
    return replace(factors, rest=rest, relative_error=factors.relative_error * float(share.sqrt()))


def _in_format(format, layer, factors):
    check_rank(factors.left.shape[1], layer.out_features, layer.in_features)
    made = format.from_factors(factors, layer.bias, layer.weight.dtype, layer.transposed)
    trainable = any(parameter.requires_grad for parameter in layer.parameters())
    made.requires_grad_(trainable)
    made.added_bias, made.relative_error = layer.added_bias, None
    made.replaced_shape = layer.replaced_shape
    return made
