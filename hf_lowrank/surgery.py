"""Find the linear maps of a model, dense or factorized. Works by module shape; knows no architecture."""

import re
import sys

from torch import nn

from .convolutions import conv_kind
from .errors import CheckpointError, ConfigError, TargetError
from .formats import FormatLinear, LowRankConv
from .kinds import dense_kind, kind_of


# What `target_modules` says instead of names.
ALL_LINEAR, ALL_LAYERS = "all-linear", "all-layers"


def check_model(model):
    """Refuse what is no model in memory."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`model`={model!r} must be a model in memory; load a name or folder with `from_pretrained`, which "
            "factorizes meanwhile if `lowrank_config` is given."
        )


def all_sites(model):
    """Every dense linear map of `model`, shared modules once, in the order of the modules.

    The linears that a factorized layer is made of are its factors, and no maps of the model.
    """
    found, factors = [], set()
    for name, module in model.named_modules():
        if isinstance(module, (FormatLinear, LowRankConv)):
            factors.update(module.modules())
        kind = None if module in factors else kind_of(module)
        if kind is not None:
            found.extend(kind.sites(name, module))
    return found


def factorized(model):
    """`{name: kind}` of every factorized site of `model`.

    A layer inside a module that `stands_for_dense`, which trains and saves a dense weight, is no site of its own.
    """
    found, inner = {}, set()
    for name, module in model.named_modules():
        if getattr(module, "stands_for_dense", False):
            inner.update(module.modules())
        if module in inner:
            continue
        if isinstance(module, FormatLinear):
            found[name] = dense_kind(module)
        elif isinstance(module, LowRankConv):
            found[name] = conv_kind(module)
        else:
            for site_name in sorted(getattr(module, "lowrank_sites", ())):
                found[_join(name, site_name)] = module.lowrank_kind
    return found


def outermost_pretrained(module, name=""):
    """`[(name, model)]` of the transformers models in `module` that are not part of another one."""
    # Attributes do not tell: wrappers forward those of what they wrap. Who has such a model has imported transformers.
    if isinstance(module, getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())):
        return [(name, module)]
    children = module.named_children()
    return [found for child, part in children for found in outermost_pretrained(part, _join(name, child))]


def _join(prefix, name):
    return f"{prefix}.{name}" if prefix else name


def tied_weights(model):
    """Names of parameters that stand for more than one: declared by transformers, or the same object twice."""
    names, paths = set(), {}
    for prefix, part in outermost_pretrained(model):
        declared = getattr(part, "all_tied_weights_keys", None) or {}
        names.update(_join(prefix, name) for pair in declared.items() for name in pair)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    return names.union(*(same for same in paths.values() if len(same) > 1))


def default_exclusions(model):
    """Names that `"all-linear"` and `"all-layers"` leave alone: embeddings' linears, output heads, and tied weights.

    A head is the output embedding of a transformers model and, where it declares its base (`base_model_prefix`), every
    linear of it outside that.
    """
    names = {key.removesuffix(".weight") for key in tied_weights(model)}
    for start, part in outermost_pretrained(model):
        head, prefix = part.get_output_embeddings(), part.base_model_prefix
        outside = bool(prefix) and isinstance(getattr(part, prefix, None), nn.Module)
        inside = f"{_join(start, prefix)}."
        for name, module in part.named_modules(prefix=start):
            if module is head or (outside and name != start and not f"{name}.".startswith(inside)):
                names.add(name)
    return names


def matches(pattern, name):
    """PEFT's rule: a string is a regular expression for the full name; a list holds names or dotted suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in pattern)


def pattern_hits(key, name):
    """PEFT's rule for `rank_pattern`: a key is a regular expression from any dot to the end of the name."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def pattern_for(name, rank_pattern):
    """The first key of `rank_pattern` that matches, or `None`."""
    return next((key for key in rank_pattern if pattern_hits(key, name)), None)


def match_sites(model, target_modules="all-linear", exclude_modules=None):
    """The sites a configuration asks for.

    Args:
        model (`torch.nn.Module`): any module that has linears inside.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): every linear but embeddings, output heads
            and tied weights; `"all-layers"`, convolutions too; or a regular expression for full names; or a list of
            names or dotted suffixes.
        exclude_modules (`str` or `list[str]`, *optional*): what to leave out of these, by the same rule.

    Raises:
        TargetError: a target or an exclusion that matches no linear, or a target whose weight is tied.
    """
    sites = all_sites(model)
    names = [site.name for site in sites]
    if "" in names:
        raise TargetError("The model is itself one layer; put it into a module, such as torch.nn.Sequential(layer).")
    for argument, pattern in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        for entry in [pattern] if isinstance(pattern, str) else [[entry] for entry in pattern or ()]:
            word = argument == "target_modules" and entry in (ALL_LINEAR, ALL_LAYERS)
            if not word and not any(_hits(entry, name, argument) for name in names):
                raise TargetError(
                    f"`{argument}`={entry if isinstance(entry, str) else entry[0]!r} matches no linear layer "
                    f"or convolution; the model has {len(names)}, such as {', '.join(names[:3]) or 'none at all'}."
                )
    if target_modules not in (ALL_LINEAR, ALL_LAYERS):
        tied = tied_weights(model)
        for site in sites:
            if site.weight_name in tied and _hits(target_modules, site.name, "target_modules"):
                raise TargetError(
                    f"`target_modules` names {site.name}, whose weight is tied to another module; untie it first "
                    "(`tie_word_embeddings=False`), or leave it out."
                )
    return selected_sites(model, target_modules, exclude_modules)


def selected_sites(model, target_modules="all-linear", exclude_modules=None):
    """What [`match_sites`] gives, without its checks, which a model that is factorized already may not pass."""
    sites = all_sites(model)
    if target_modules in (ALL_LINEAR, ALL_LAYERS):
        skip = default_exclusions(model)
        sites = [site for site in sites if site.name not in skip]
        if target_modules == ALL_LINEAR:
            sites = [site for site in sites if not site.kind.convolution]
    else:
        sites = [site for site in sites if _hits(target_modules, site.name, "target_modules")]
    if exclude_modules:
        sites = [site for site in sites if not _hits(exclude_modules, site.name, "exclude_modules")]
    return sites


def _hits(pattern, name, argument):
    try:
        return matches(pattern, name)
    except re.error as error:
        raise ConfigError(f"`{argument}`={pattern!r} is not a regular expression: {error}.") from error


def specs(model):
    """What a checkpoint has to say about `model` as it stands: `{name: {"format", ..., "relative_error"}}`."""
    found = {}
    for name, kind in factorized(model).items():
        found[name] = kind.spec(model, name)
        error = kind.relative_error(model, name)
        if error is not None:
            found[name]["relative_error"] = error
    return found


def lend_bases(model, specs):
    """Give every layer that `specs` say borrows a basis the layer it borrows from.

    Args:
        model (`torch.nn.Module`): holds the empty or filled layers.
        specs (`dict[str, dict]`): by module name.

    Raises:
        CheckpointError: a lender that is not there or does not fit.
    """
    borrowed = {name: spec["basis"] for name, spec in specs.items() if "basis" in spec}
    modules = dict(model.named_modules()) if borrowed else {}
    for name, lender in borrowed.items():
        if not isinstance(lender, str) or lender not in modules:
            raise CheckpointError(
                f"{name} borrows the basis of {lender!r}, which this {type(model).__name__} does not have; load it "
                "with the architecture it was saved from."
            )
        try:
            modules[name].borrow(modules[lender])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
