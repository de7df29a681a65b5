"""`auto_fact`: one call for any torch module, with the arguments of Greenformers."""

import copy
import logging
import re
from collections.abc import Iterable

from torch import nn

from ..checks import check_integer, is_integer, is_number
from ..errors import ConfigError, NonFiniteError, RankError, UnknownNameError
from ..formats import FORMATS
from ..methods import METHODS
from ..surgery import all_sites, factorized, tied_weights
from .config import LowRankConfig
from .verbs import factorize


logger = logging.getLogger(__name__)

STAGES = {"post": "svd", "by_design": "random"}
# What the number of iterations means to each solver.
SOLVERS = {
    "svd": lambda count: {"name": "svd"},
    "rsvd": lambda count: {"name": "svd", "solver": "randomized", "power_iterations": count},
    "nmf": lambda count: {"name": "nmf", "iterations": count},
    "snmf": lambda count: {"name": "snmf", "sweeps": count},
    "random": lambda count: {"name": "random"},
}


def auto_fact(
    module,
    rank,
    solver=None,
    num_iter=10,
    submodules=None,
    deepcopy=False,
    fact_led_unit=False,
    stage="post",
):
    r"""Factorize every linear and convolution of any torch module at one rank, without data.

        W (out, in) ~ left (out, r) @ right (r, in),    r_max = floor(out in / (out + in))

    The kernel of a convolution is a matrix with a row an output channel ([`LowRankConv`]). What stays dense, and why,
    is told in one warning: nothing is left out silently. [`factorize`] has methods that look at data, and budgets.

    Args:
        module (`torch.nn.Module`): changed in place, unless `deepcopy`; one that is itself a layer is replaced.
        rank (`int` or `float`): of every layer, at least 1; or a share of each layer's own r_max, in (0, 1).
        solver (`str`, *optional*): `"svd"`; `"rsvd"`, randomized, for ranks far below both sides; `"nmf"` and
            `"snmf"`, of which both or one factor has no negative entry; `"random"`, which forgets the weight. By
            default what suits the stage.
        num_iter (`int`, defaults to 10): power iterations of `rsvd`, sweeps of `nmf` and `snmf`, at least 1.
        submodules (`list[torch.nn.Module]`, *optional*): parts of `module` to which it is confined.
        deepcopy (`bool`, defaults to `False`): work on a copy, and return that.
        fact_led_unit (`bool`, defaults to `False`): whether factors become factors again, which is refused.
        stage (`str`, defaults to `"post"`): `"post"`, after training, where the default solver is `svd` and `random`
            is refused; or `"by_design"`, before training from scratch, where the default solver is `random`.

    Returns:
        The factorized module: `module` itself, its copy, or what has taken its place.

    Raises:
        UnknownNameError: a solver or a stage that there is not.
        ConfigError: another argument that is not allowed, or a module that is factorized already.
        MissingPackageError: `solver="nmf"` without scikit-learn.
        RankError: a rank out of range.
        NonFiniteError: a weight holds NaN or infinity.

    Reference:
        Greenformers (thesis, 2021), `auto_fact` of version 0.2.2. Differs: there, the default solver is `random`, also
        for unknown names and after training; layers at the root are skipped; output heads are factorized here too, but
        weights that are tied to others are not.
    """
    if stage not in STAGES:
        raise UnknownNameError(f"Unknown `stage` {stage!r}; choose one of {sorted(STAGES)}.")
    solver = STAGES[stage] if solver is None else solver
    if solver not in SOLVERS:
        raise UnknownNameError(f"Unknown `solver` {solver!r}; choose one of {sorted(SOLVERS)}.")
    _check(rank, solver, num_iter, fact_led_unit, stage)
    if factorized(module):
        raise ConfigError(
            "The module is factorized already; give one that is not, or lower its ranks with hf_lowrank.truncate."
        )
    inside = None if submodules is None else _names(module, submodules)
    module = copy.deepcopy(module) if deepcopy else module
    ranks, dense = _ranks(module, rank, inside)
    if dense:
        logger.warning("auto_fact makes factors of %d weights; dense stay %s.", len(ranks), _told(dense))
    if not ranks:
        return module
    config = LowRankConfig(
        method=METHODS.build(SOLVERS[solver](num_iter)),
        # A key matches the end of a name as well: the whole name has to come before its ends.
        rank_pattern={re.escape(name or "root"): ranks[name] for name in sorted(ranks, key=len, reverse=True)},
        target_modules="|".join(re.escape(name or "root") for name in ranks),
        calibration=None,
    )
    try:
        return factorize(module, config)
    except NonFiniteError as error:
        # The cure that it names is an argument of configurations.
        cause = str(error).replace("leave it out with `exclude_modules`", "confine auto_fact with `submodules`")
        raise NonFiniteError(cause) from error


def _check(rank, solver, num_iter, fact_led_unit, stage):
    share = is_number(rank) and isinstance(rank, float) and 0 < rank < 1
    if not share and not is_integer(rank, 1):
        raise RankError(
            f"`rank`={rank!r} must be an integer of at least 1, or a share of each layer's largest useful rank in "
            "(0, 1)."
        )
    check_integer("num_iter", num_iter, 1)
    if fact_led_unit:
        raise ConfigError(
            "`fact_led_unit`=True would make factors of factors, three matrices in a row that say no more than two; "
            "lower the rank with hf_lowrank.truncate instead."
        )
    if solver == "random" and stage == "post":
        raise ConfigError(
            "`solver`='random' forgets what the weights have learned; give `stage`='by_design' to train from scratch, "
            "or another solver."
        )


def _names(module, submodules):
    """Names of `submodules` in `module`."""
    known = {id(part): name for name, part in module.named_modules()}
    parts = [submodules] if isinstance(submodules, nn.Module) else submodules
    parts = list(parts) if isinstance(parts, Iterable) else []
    if not parts or any(id(part) not in known for part in parts):
        raise ConfigError(
            f"`submodules`={submodules!r} must be a non-empty list of modules inside `module`; get them with "
            "`module.get_submodule(name)`."
        )
    return [known[id(part)] for part in parts]


def _ranks(module, rank, inside):
    """`({site: rank}, {reason: [layer, ...]})` of what becomes factors, and of what does not."""
    tied, ranks, dense = tied_weights(module), {}, {}
    sites = {site.name: site for site in all_sites(module)}
    for name, site in sites.items():
        if inside is not None and not any(part == "" or f"{name}.".startswith(f"{part}.") for part in inside):
            continue
        own = rank
        if isinstance(rank, float):
            rows, columns = site.out_features, site.in_features
            own = int(rows * columns // (rows + columns) * rank)
        edge = FORMATS["low_rank"].break_even(site.out_features, site.in_features)
        step = site.kind.min_rank_multiple
        reason = None
        if site.weight_name in tied:
            reason = "weights that are tied to others"
        elif own < 1:
            reason = f"weights too small for a share of {rank}"
        elif own >= edge:
            reason = "weights that the rank makes no smaller"
        elif own % step:
            reason = f"experts, whose ranks are multiples of {step}"
        if reason is None:
            ranks[name] = own
        else:
            shape = f"{site.out_features} x {site.in_features}"
            dense.setdefault(reason, []).append(f"{name or 'root'} ({shape})")
    for name, kind in _others(module, sites).items():
        if inside is None or any(part == "" or f"{name}.".startswith(f"{part}.") for part in inside):
            dense.setdefault("weights of modules that are neither linear nor convolution", []).append(
                f"{name or 'root'} ({kind})"
            )
    return ranks, dense


def _others(module, sites):
    """`{module: class}` of what holds matrices and is no site."""
    owners = {site.owner for site in sites.values()}
    return {
        name: type(part).__name__
        for name, part in module.named_modules()
        if name not in owners and any(p is not None and p.ndim > 1 for p in part._parameters.values())
    }


def _told(dense):
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in dense.items())
