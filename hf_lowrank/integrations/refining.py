"""Refinement of a model in memory, on a twin: a failure leaves the model as it was."""

import torch

from ..blocks import block_names
from ..formats import FORMATS
from ..replace import Made, put
from ..statistics.collect import call_arguments
from ..surgery import match_sites, pattern_for
from .progress import bar
from .twin import twin_of


def refined(model, plan, made, config, batches, folder=None):
    """Factors, biases and norms after `config.refine`.

    Args:
        model (`torch.nn.Module`): dense, in memory; its norms and biases inside the blocks are set at the end.
        plan ([`Plan`]): what is factorized.
        made (`dict[str, Made]`): the factors by site, which are trained in place.
        config ([`Recipe`]): the refinement and the seed.
        batches (`list[dict]`): calibration data.
        folder (`str`, *optional*): where finished blocks are kept.

    Returns:
        `dict[str, Made]`: the trained factors by site.

    Raises:
        ResourceError: the model is split over processes.
    """
    sites = list(plan.members.values())
    names = block_names(model, [site.name for site in sites])
    twin = twin_of(model, trainable(model, plan, config, names))
    config.refine.refine(
        twin,
        sites,
        lambda site: put(twin, site, made[site.name]),
        arguments_of(model, config.refine, batches),
        config.seed,
        folder,
        lambda iterable: bar(iterable, "Refining"),
        model,
    )
    with torch.no_grad():
        found = {site.name: _made_again(twin, site, made[site.name]) for site in sites}
        own = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            # Shared parameters are the same object; factors have other names.
            if name in own and own[name] is not parameter:
                own[name].copy_(parameter)
    return found


def trainable(model, plan, config, names):
    """Full names of the parameters inside the blocks `names` that are trained beside the factors.

    Norms and biases are, and weights that the budget has left dense. What the user has left out or pinned as dense is
    not, nor is any other matrix, as of a router, and nothing else of a module that holds one.
    """
    free = {
        site.weight_name
        for site in match_sites(model, config.target_modules, config.exclude_modules)
        if site.name in plan.members
        or (site.name in plan.dense and pattern_for(site.name, config.rank_pattern) is None)
    }
    found = set()
    for path, module in model.named_modules():
        if any(f"{path}.".startswith(f"{block}.") for block in names):
            own = {f"{path}.{name}": p for name, p in module.named_parameters(recurse=False)}
            if all(p.ndim < 2 or name in free for name, p in own.items()):
                found.update(own)
    return found - {site.weight_name for site in plan.members.values()}


def arguments_of(model, refinement, batches):
    """What the model is called with, for every batch of the calibration data."""
    return [call_arguments(model, batch, all_positions=refinement.predicts) for batch in batches]


def _made_again(twin, site, made):
    """The site's tensors as they stand in the twin."""
    stored = site.kind.stored(twin, site.name, bias=True)
    bias = stored.pop(site.kind.bias_name(site, FORMATS[made.spec["format"]]), None)
    return Made(made.spec, {n: t.detach() for n, t in stored.items()}, None if bias is None else bias.detach())
