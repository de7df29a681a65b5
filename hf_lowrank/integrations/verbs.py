"""The verbs for models in memory: factorize, collect_statistics, to_dense."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CalibrationError, ConfigError, LowRankError
from ..factorize import factorize_site, make_plan, measure_site
from ..formats import FORMATS
from ..linalg import require_finite
from ..methods import METHODS
from ..recipe import Recipe
from ..statistics.collect import collect
from ..surgery import factorized, match_sites, specs
from .calibration import as_calibration, check_calibration, load_tokenizer, make_batches, saved_statistics
from .progress import Progress, bar


def factorize(model, config=None, calibration=None, tokenizer=None):
    """Factorize a model in memory, in place.

    Args:
        model (`torch.nn.Module`): any module with linears inside; transformers models can be saved afterwards and
            load with plain `from_pretrained`.
        config ([`LowRankConfig`], *optional*): how; the default configuration if not given.
        calibration (*optional*): overrides `config.calibration`; also takes collected [`Statistics`].
        tokenizer (*optional*): for calibration texts; by default the one at `model.name_or_path`.

    Returns:
        The same model.

    Raises:
        LowRankError: of the kind that fits; the model is as it was, since everything is checked first.
    """
    from .config import LowRankConfig
    from .quantizer import attach, statistics_shapes

    config = LowRankConfig() if config is None else copy.copy(config)
    if not isinstance(config, Recipe):
        raise ConfigError(f"`config` must be a LowRankConfig, not {type(config).__name__}.")
    if factorized(model):
        raise ConfigError("The model is factorized already; call hf_lowrank.to_dense(model) first.")
    if calibration is not None:
        config.calibration = calibration
    plan = make_plan(model, config)
    _refuse_offloaded(model)
    statistics, provenance = None, None
    if config.needs_statistics:
        resolved = as_calibration(config.calibration)
        statistics = saved_statistics(resolved)
        if statistics is None:
            statistics = collect_for(model, config, resolved, _tokenizer_for(model, tokenizer))
        statistics.check(statistics_shapes(plan.sites.values(), config.method.statistics))
        provenance = statistics.provenance
    for site in plan.sites.values():
        require_finite(site.kind.weight(model, site), f"The weight of {site.name}")
    if config.allocation.needs_curves and config.rank is None:
        curves = {}
        progress = Progress(len(plan.sites), "Measuring")
        for site in plan.sites.values():
            progress.start(site.name)
            curves[site.name] = measure_site(site, site.kind.weight(model, site), config, statistics)
            progress.done()
        progress.close()
        plan = make_plan(model, config, curves=curves)
    progress = Progress(len(plan.sites))
    modules = plan.specs(config.format)
    for site in plan.sites.values():
        progress.start(site.name)
        _replace(model, site, modules[site.name], config, plan.ranks[site.name], statistics)
        progress.done()
    progress.close()
    if isinstance(model, PreTrainedModel):
        config.recipe = {**config.to_json(), "calibration": provenance}
        config.modules = specs(model)
        attach(model, config)
    return model


@torch.no_grad()
def _replace(model, site, spec, config, rank, statistics):
    weight, bias = site.kind.weight(model, site), site.kind.bias(model, site)
    trainable = model.get_parameter(site.weight_name).requires_grad
    tensors, error = factorize_site(site, weight, rank, config, statistics, weight.dtype)
    if bias is not None:
        tensors[site.kind.bias_name(site, FORMATS[config.format])] = bias
    site.kind.skeleton(model, site, {**spec, "relative_error": error}, weight.dtype)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=trainable))


def collect_statistics(model, calibration="self", tokenizer=None, method="whitened_svd", **targets):
    """Run calibration data through a dense model and return what `method` needs to know.

    Args:
        model (`PreTrainedModel`): dense, in memory or dispatched over devices and disk.
        calibration (defaults to `"self"`): as `calibration` of [`LowRankConfig`].
        tokenizer (*optional*): for texts; by default the one at `model.name_or_path`.
        method (`str` or [`Method`], defaults to `"whitened_svd"`): decides which statistics.
        targets: `target_modules`, `exclude_modules`, `seed` of [`LowRankConfig`].

    Returns:
        [`Statistics`]; `.save("statistics.safetensors")` keeps it, and `calibration="statistics.safetensors"` uses it.
    """
    method = METHODS.build(method)
    recipe = Recipe(method=method, calibration=calibration, **targets)
    return collect_for(model, recipe, as_calibration(calibration), _tokenizer_for(model, tokenizer))


def collect_for(model, recipe, calibration, tokenizer):
    """The statistics `recipe` needs of `model`; `tokenizer` is a function that loads one if text has to be read."""
    if not recipe.method.statistics:
        raise CalibrationError(f"`method`={recipe.method.name!r} needs no statistics.")
    check_calibration(calibration, model)
    sites = match_sites(model, recipe.target_modules, recipe.exclude_modules)
    for site in sites:
        weight = model.get_parameter(site.weight_name)
        if weight.device.type != "meta":
            require_finite(weight.detach(), f"The weight of {site.name}")
    batches, provenance = make_batches(calibration, model, tokenizer, recipe.seed)
    return collect(
        model,
        sites,
        recipe.method.statistics,
        batches,
        provenance,
        progress=lambda iterable: bar(iterable, "Calibrating"),
        seed=recipe.seed,
    )


def to_dense(model):
    """Multiply the factors out, in place: an ordinary transformers model again, which loads without hf_lowrank.

    Args:
        model (`torch.nn.Module`): factorized; others are returned as they are.

    Returns:
        The same model, with weights of the original shapes and the error of the factorization in them.
    """
    _refuse_offloaded(model)
    for name, kind in factorized(model).items():
        kind.to_dense(model, name)
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        # The attribute is part of the class's protocol: absent for models that never had a quantizer.
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
    return model


def _refuse_offloaded(model):
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise LowRankError(
            "Some weights of the model are on disk or on the meta device; load it with "
            "`from_pretrained(..., lowrank_config=...)`, which factorizes while it loads, or without offloading."
        )


def _tokenizer_for(model, tokenizer):
    return lambda: tokenizer if tokenizer is not None else load_tokenizer(getattr(model, "name_or_path", ""))
