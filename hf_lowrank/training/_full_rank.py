"""Factors of every singular value in the place of dense weights: where training that finds ranks begins."""

import re

import torch

from ..errors import ConfigError, TargetError
from ..integrations import LowRankConfig, factorize
from ..linalg import singular_energies
from ._base import share


def full_rank(model, sites, format, floor=0.0):
    """Put factors that leave (almost) nothing out into the place of dense weights, in place.

    transformers models can be saved at any time afterwards, and load with plain `from_pretrained`.

    Args:
        model (`torch.nn.Module`): dense.
        sites (`list[Site]`): which; experts of a mixture stay as they are.
        format (`str`): registered name; of a format that has a rank a singular value.
        floor (`float`, defaults to 0.0): singular values up to this part of their mean are left out.

    Raises:
        TargetError: there is nothing but experts.
    """
    sites = [site for site in sites if site.kind.single]
    if not sites:
        raise TargetError(
            "`target_modules` names experts of a mixture only, whose factors are trained as they are; widen it."
        )
    # Some backends of processes move what is on their own kind of device only.
    device = next(model.parameters()).device
    ranks = torch.tensor([_rank(model, site, floor) for site in sites], device=device)
    share(ranks)
    # Anchored: a key would match the ends of longer names too.
    pattern = {rf"^{re.escape(site.name)}": rank for site, rank in zip(sites, ranks.tolist(), strict=True)}
    config = LowRankConfig(
        method="svd", format=format, rank_pattern=pattern, target_modules="|".join(pattern), calibration=None
    )
    factorize(model, config)


def _rank(model, site, floor):
    if not floor:
        return min(site.out_features, site.in_features)
    values = singular_energies(site.kind.weight(model, site)[0]).sqrt()
    return max(1, int((values > floor * values.mean()).sum()))


def refuse_stale(optimizer, model):
    """Refuse an optimizer that does not hold what is trained: parameters were replaced after it was made.

    Raises:
        ConfigError: naming the first that it lacks.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ConfigError(
                f"The optimizer was made before {name}, and would leave it as it is; make a new Trainer for another "
                "run, give it `model`, not `model_init`, and the callback among its `callbacks`."
            )
