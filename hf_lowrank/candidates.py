"""What an allocator is told of each target: which ranks it may have, and what they cost in the unit of the budget."""

import functools
import math
from dataclasses import replace

from .allocation import Candidate, allowed_ranks
from .errors import ConfigError
from .factorize import format_for
from .formats import FORMATS


def candidate_for(model, site, recipe, measured):
    """The [`Candidate`] of one target.

    Args:
        model (`torch.nn.Module`): may be on the meta device.
        site (`Site`): the target.
        recipe ([`Recipe`]): says in which unit costs are.
        measured ([`Measured`]): its curve and its latencies, where they are known.
    """
    format = FORMATS[format_for(site, recipe)]
    shape = site.out_features, site.in_features
    least = rank_step(site, recipe)
    curve = None if measured.curves is None or site.name not in measured.curves else measured.curves[site.name]
    cost, dense_cost = _costs(model, site, format, recipe, measured)
    limit = _limit(model, site, format, recipe.method)
    times = measured.latencies.of(*shape) if recipe.needs_latencies and measured.latencies is not None else None
    return Candidate(
        name=site.name,
        out_features=site.out_features,
        in_features=site.in_features,
        copies=site.copies,
        rank_multiple=math.lcm(recipe.rank_multiple, least),
        least_rank=least,
        cost=cost,
        break_even=_first_not_cheaper(cost, dense_cost, limit),
        curve=None if curve is None else curve[1:].tolist(),
        total=None if curve is None else float(curve[0]),
        dense_cost=dense_cost,
        time=None if times is None else times.at,
        dense_time=None if times is None else times.dense,
    )


def _limit(model, site, format, method):
    """The lowest rank at which nothing is saved: in the numbers that budgets count, or in bytes."""
    shape, size = (site.out_features, site.in_features), model.get_parameter(site.weight_name).element_size()

    def stored(rank):
        return format.stored_bytes(*shape, rank, size, **method.layout(*shape, rank))

    dense = shape[0] * shape[1]
    limit = _first_not_cheaper(functools.partial(method.counted, format, *shape), dense, min(shape) + 1)
    return _first_not_cheaper(stored, size * dense, limit)


def _costs(model, site, format, recipe, measured):
    """`(cost of the factors at a rank, cost of the dense weight)` in the unit of the budget."""
    shape, dense = (site.out_features, site.in_features), site.copies * site.out_features * site.in_features
    bias = site.out_features if recipe.method.shifts and not site.bias else 0

    def layout(rank):
        return recipe.method.layout(*shape, rank)

    if recipe.target_bytes is not None:
        size = model.get_parameter(site.weight_name).element_size()
        stored = functools.partial(format.stored_bytes, *shape, dtype_size=size)
        return lambda rank: site.copies * (stored(rank, **layout(rank)) + bias * size), size * dense
    if recipe.needs_latencies and len(site.members) > 1:
        raise ConfigError(
            f"`allocation`={recipe.allocation.name!r} counts time, and {site.name} shares a basis with others, "
            "which is not measured; count parameters, or leave `joint_groups` and `share_layers` unset."
        )
    if recipe.allocation.cost == "latency" and recipe.needs_latencies and measured.latencies is not None:
        times = measured.latencies.of(*shape)
        return lambda rank: site.copies * times.at(rank), site.copies * times.dense
    return lambda rank: site.copies * (recipe.method.counted(format, *shape, rank) + bias), dense


def _first_not_cheaper(cost, dense_cost, limit):
    """The lowest rank up to `limit` whose factors cost no less than the dense weight."""
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        if cost(middle) >= dense_cost:
            high = middle
        else:
            low = middle + 1
    return low


def rank_step(site, recipe):
    """What every rank of a target is a multiple of, wherever the rank comes from."""
    return math.lcm(site.kind.min_rank_multiple, recipe.rank_step)


def least_cost(candidate):
    """The cost at the lowest rank that the kernel takes; of the dense weight where that saves nothing."""
    ranks = allowed_ranks(replace(candidate, rank_multiple=candidate.least_rank))
    return candidate.cost(ranks[0]) if ranks else candidate.dense_cost
