"""What will happen to which weight: targets, budget and ranks, decided before any weight is touched."""

import logging
from dataclasses import dataclass

import torch

from .allocation import fill, rank_for_energy, within_reach
from .candidates import candidate_for, least_cost, rank_step
from .errors import ConfigError, RankError, TargetError
from .factorize import format_for
from .formats import FORMATS, check_rank
from .groups import group_sites
from .recipe import DENSE
from .sizes import stored_bytes
from .statistics import STATISTICS
from .surgery import match_sites, pattern_for, pattern_hits


logger = logging.getLogger(__name__)

# What factors are computed of; the arithmetic in between is float64.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Measured:
    """What is known about the targets beyond their shapes; every part only where the recipe asks for it.

    Args:
        curves (`dict[str, torch.Tensor]`, *optional*): what the allocator asks for, at every rank from 0 on, by site.
        latencies ([`Latencies`], *optional*): of layers of the targets' shapes.
        probe ([`Probe`], *optional*): the model, for allocators that look at its outputs.
        ranks (`dict[str, int | None]`, *optional*): what an allocator has decided before; `None` is dense.
    """

    curves: dict | None = None
    latencies: object = None
    probe: object = None
    ranks: dict | None = None

    def suffices(self, recipe):
        """Whether the ranks of `recipe` can be decided."""
        if self.ranks is not None:
            return True
        return not (recipe.needs_curves and self.curves is None or recipe.needs_probe and self.probe is None)


@dataclass
class Plan:
    """What will happen to which weight.

    Args:
        sites (`dict[str, Site]`): what becomes factors, weights and groups of weights, by name.
        ranks (`dict[str, int]`): their ranks.
        formats (`dict[str, str]`): how each is stored.
        layouts (`dict[str, dict]`): what their specs say beside rank and format.
        dense (`list[str]`): targets that stay dense, because factors would not be smaller or the user said so.
        shifts (`bool`): whether the method changes biases, so that every factorized weight has one.
    """

    sites: dict
    ranks: dict
    formats: dict
    layouts: dict
    dense: list
    shifts: bool

    @property
    def members(self):
        """`{name: site}` of every single weight that becomes factors."""
        return {member.name: member for site in self.sites.values() for member in site.members}

    def unit(self, name):
        """What the weight `name` is factorized with: its group, or itself."""
        return next(site for site in self.sites.values() if any(member.name == name for member in site.members))

    def statistics_shapes(self, names):
        """`{module: {statistic: shape}}` that a method with statistics `names` needs."""
        return {
            site.name: {name: STATISTICS[name].shape(site.out_features, site.in_features) for name in names}
            for site in self.members.values()
        }

    def specs(self):
        """The `modules` entry of a checkpoint config."""
        return {
            member.name: {"format": self.formats[name], "rank": self.ranks[name]}
            | self.layouts[name]
            | ({"bias": True} if self.shifts and not member.bias else {})
            | ({"basis": name} if member.name != name else {})
            for name, site in self.sites.items()
            for member in site.members
        }


def make_plan(model, recipe, available=None, measured=None):
    """Decide the rank of every target, before any weight is touched.

    Args:
        model (`torch.nn.Module`): may be on the meta device.
        recipe ([`Recipe`]): what to do.
        available (`Callable[[Site], bool]`, *optional*): whether the checkpoint holds a site's weight; others are left
            as they are (a new head has nothing to factorize).
        measured ([`Measured`], *optional*): what the allocator wants to know. Where that is missing, every free weight
            gets the lowest rank: a plan to measure with.

    Raises:
        TargetError, RankError, ConfigError: every argument that does not fit the model.
    """
    measured = Measured() if measured is None else measured
    sites = match_sites(model, recipe.target_modules, recipe.exclude_modules)
    if available is not None:
        sites = [site for site in sites if available(site)]
    if not sites:
        raise TargetError(
            f"`target_modules`={recipe.target_modules!r} leaves no linear layer to factorize after `exclude_modules`="
            f"{recipe.exclude_modules!r}; widen the one or narrow the other."
        )
    for site in sites:
        _check_convolution(site, recipe)
        _check_copies(site, recipe)
        _check_dtype(model, site)
    sites = group_sites(model, sites, recipe.method)
    pinned = _fixed_ranks(sites, recipe.rank_pattern)
    fixed = pinned if recipe.rank is None else {site.name: recipe.rank for site in sites} | pinned
    candidates = {site.name: candidate_for(model, site, recipe, measured) for site in sites}
    free = [candidates[site.name] for site in sites if site.name not in fixed]
    if recipe.allocates:
        recipe.allocation.check(free)
    budget = _budget(model, sites, recipe, candidates, fixed)
    ranks = {**fixed, **_free_ranks(free, budget, recipe, measured)}
    # A global rank may be too high for some weights, but one that makes none smaller has to be right for all.
    rest = [candidates[site.name] for site in sites if site.name not in pinned]
    lenient = recipe.rank is not None and any(recipe.rank < candidate.break_even for candidate in rest)
    chosen, dense = {}, []
    for site in sites:
        rank = ranks[site.name]
        if rank in (None, DENSE):
            dense.extend(member.name for member in site.members)
            continue
        # A rank the user names for one module is kept even where it saves nothing; a global one is not.
        kept = site.name in pinned or rank < candidates[site.name].break_even
        if kept or not lenient:
            check_rank(rank, site.out_features, site.in_features, site.name)
            _check_multiple(site, rank, recipe)
            _check_shift(site, recipe)
        if kept:
            chosen[site.name] = rank
        else:
            dense.extend(member.name for member in site.members)
    if not chosen:
        logger.warning("Nothing becomes smaller: all %d targets stay dense at this budget.", len(dense))
    if measured.suffices(recipe):
        _warn_if_over(free, chosen, budget, recipe)
    sites = {site.name: site for site in sites if site.name in chosen}
    formats = {name: format_for(site, recipe) for name, site in sites.items()}
    layouts = {
        name: recipe.method.layout(site.out_features, site.in_features, chosen[name]) for name, site in sites.items()
    }
    return Plan(sites, chosen, formats, layouts, dense, recipe.method.shifts)


def _free_ranks(free, budget, recipe, measured):
    """Ranks of the weights that the user did not set apart."""
    if not free:
        return {}
    if measured.ranks is not None:
        return {candidate.name: measured.ranks[candidate.name] for candidate in free}
    if not measured.suffices(recipe):
        return {candidate.name: candidate.least_rank for candidate in free}
    ranks = {}
    if recipe.needs_curves:
        # Not measured is what no rank makes smaller.
        ranks = {candidate.name: None for candidate in free if candidate.curve is None}
        if budget is not None:
            budget -= sum(candidate.dense_cost for candidate in free if candidate.name in ranks)
        free = [candidate for candidate in free if candidate.name not in ranks]
    if recipe.energy is not None:
        return {**ranks, **{candidate.name: rank_for_energy(candidate, recipe.energy) for candidate in free}}
    free = within_reach(free, budget)
    asked = (free, budget, measured.probe) if recipe.allocation.needs_probe else (free, budget)
    found = recipe.allocation.allocate(*asked)
    return {**ranks, **(found if recipe.target_bytes is None else fill(free, found, budget))}


def _budget(model, sites, recipe, candidates, fixed):
    """What the weights without a fixed rank may cost together; `None` where no budget is given.

    Raises:
        ConfigError: `target_bytes` is out of reach.
    """
    free = [candidates[site.name] for site in sites if site.name not in fixed]
    if recipe.param_ratio is not None:
        return recipe.param_ratio * sum(candidate.dense_cost for candidate in free)
    if recipe.target_bytes is None:
        return recipe.target_params
    members = [member for site in sites for member in site.members]
    tensors = max(FORMATS[format_for(site, recipe)].tensors for site in sites)
    rest = stored_bytes(model, members, recipe.method.shifts, tensors)
    rest -= sum(candidate.dense_cost for candidate in free)
    for name, rank in fixed.items():
        if rank != DENSE:
            rest += candidates[name].cost(rank) - candidates[name].dense_cost
    least = rest + sum(least_cost(candidate) for candidate in free)
    if least > recipe.target_bytes:
        raise ConfigError(
            f"`target_bytes`={recipe.target_bytes} cannot be reached: with the lowest allowed rank of all "
            f"{len(free)} free targets, the model takes {least} bytes, of which {rest} are in other weights. Give at "
            "least that, widen `target_modules`, or load in a smaller `dtype`."
        )
    return recipe.target_bytes - rest


def _warn_if_over(free, chosen, budget, recipe):
    kept = sum(c.cost(chosen[c.name]) if c.name in chosen else c.dense_cost for c in free)
    if budget is not None and kept > budget:
        logger.warning(
            "The budget is %d %s, but even the smallest allowed ranks keep %d of %d; raise the budget.",
            budget,
            "nanoseconds" if recipe.allocation.cost == "latency" else "parameters",
            kept,
            sum(candidate.dense_cost for candidate in free),
        )


def _check_shift(site, recipe):
    if recipe.method.shifts and not site.kind.takes_shift:
        raise ConfigError(
            f"`method`={recipe.method.name!r} changes biases, and {site.name} has no place for them; leave "
            "it out with `exclude_modules`, or choose a method or an option that changes none."
        )


def _check_dtype(model, site):
    dtype = model.get_parameter(site.weight_name).dtype
    if dtype.is_complex or (dtype.is_floating_point and dtype not in FLOATS):
        raise TargetError(
            f"The weight of {site.name} is of {dtype}, and factors are computed of {', '.join(map(str, FLOATS))}; "
            "convert it, or leave it out with `exclude_modules`."
        )


def _check_convolution(site, recipe):
    if not site.kind.convolution:
        return
    refused = (
        (recipe.method.anchored, "method", recipe.method, "compares the inputs of linear layers"),
        (recipe.refine is not None, "refine", recipe.refine, "trains blocks of linear layers"),
        (recipe.needs_latencies, "allocation", recipe.allocation, "counts the time of linear layers"),
    )
    for applies, argument, value, does in refused:
        if applies:
            raise ConfigError(
                f"`{argument}`={value.name!r} {does}, and {site.name} is a convolution; leave it dense with "
                f"`exclude_modules`, or choose another `{argument}`."
            )


def _check_copies(site, recipe):
    if recipe.first_order and site.copies > 1:
        raise ConfigError(
            f"`allocation`={recipe.allocation.name!r} needs the gradient of each weight, and the {site.copies} "
            f"experts of {site.name} have one statistic together; leave them dense with `exclude_modules`, or choose "
            "another allocation."
        )


def _check_multiple(site, rank, recipe):
    least = rank_step(site, recipe)
    if rank % least:
        raise RankError(
            f"rank={rank} for {site.name} must be a multiple of {least}, since its kernel reads aligned rows, or "
            "`quantization_config` divides rows into groups; round it in `rank` or `rank_pattern`."
        )


def _fixed_ranks(sites, rank_pattern):
    used, fixed = set(), {}
    for site in sites:
        used.update(key for key in rank_pattern for member in site.members if pattern_hits(key, member.name))
        keys = [pattern_for(member.name, rank_pattern) for member in site.members]
        ranks = list(dict.fromkeys(rank_pattern[key] for key in keys if key is not None))
        if len(ranks) > 1:
            raise ConfigError(
                f"`rank_pattern` gives the weights that share a basis with {site.name} different ranks, {ranks}; give "
                "them one, or keep a weight out of the group with `exclude_modules`."
            )
        if ranks:
            fixed[site.name] = ranks[0]
    unused = sorted(set(rank_pattern) - used)
    if unused:
        raise TargetError(
            f"`rank_pattern` has keys that match no targeted linear: {unused}; targets are {len(sites)} layers, such "
            f"as {sites[0].name}."
        )
    return fixed
