"""The verbs for models in memory: factorize, collect_statistics, to_dense."""

import os
import sys
from collections import OrderedDict
from contextlib import contextmanager

import torch
from accelerate.utils import is_compiled_module
from torch import nn

from ..errors import CalibrationError, ConfigError, LowRankError, TargetError
from ..factorize import factorize_site, shifted_bias
from ..linalg import require_finite
from ..plan import make_plan
from ..recipe import Recipe
from ..replace import Made, put
from ..surgery import all_sites, check_model, factorized, match_sites, outermost_pretrained
from .anchoring import anchored
from .calibration import as_calibration, load_tokenizer
from .config import QUANT_METHOD, LowRankConfig
from .densify import detach, multiply_out
from .planning import check_latencies, collect_for, gather, informed_plan, refuse_uncollectable
from .processes import processes_for
from .progress import Progress
from .quantizer import LowRankQuantizer, attach
from .refining import arguments_of, refined


def factorize(model, config=None, calibration=None, tokenizer=None):
    """Factorize a model in memory, in place.

    Args:
        model (`torch.nn.Module`): any module with linears or convolutions inside; transformers models can be saved
            afterwards and load with plain `from_pretrained`. One that is itself a layer is called `root`, in
            `rank_pattern` and in messages.
        config ([`LowRankConfig`], *optional*): how; the default configuration if not given.
        calibration (*optional*): overrides `config.calibration`; also takes collected [`Statistics`].
        tokenizer (*optional*): for calibration texts; by default the one at `model.name_or_path`.

    Returns:
        The same model; of a model that is itself a layer, the factorized one.

    Raises:
        LowRankError: of the kind that fits; the model is as it was, since everything is checked first.
    """
    config = LowRankConfig() if config is None else config
    if not isinstance(config, LowRankConfig):
        raise ConfigError(f"`config` must be a LowRankConfig, not {type(config).__name__}.")
    check_model(model)
    config = config.again(calibration)
    if config.inner is not None:
        raise ConfigError(
            "`config` asks for quantized factors, which are made while a model loads; factorize with a LowRankConfig "
            "of your own, save, and call from_pretrained(folder, quantization_config=...)."
        )
    calibration = config.calibration if calibration is None else calibration
    if any(site.name == "" for site in all_sites(model)):
        held = _held(model)
        return factorize_in_memory(held, config, calibration, tokenizer_for(model, tokenizer)).root
    return factorize_in_memory(model, config, calibration, tokenizer_for(model, tokenizer))


def _held(layer):
    """A module with `layer` inside, where it can be replaced."""
    return nn.Sequential(OrderedDict(root=layer)).train(layer.training)


def factorize_in_memory(model, config, calibration, tokenizer, available=None):
    """What [`factorize`] does with checked arguments; returns `model`.

    Args:
        model (`torch.nn.Module`): dense.
        config ([`LowRankConfig`]): becomes part of the model.
        calibration: as `calibration` of [`LowRankConfig`].
        tokenizer (`Callable[[], PreTrainedTokenizer]`): called if text has to be read.
        available (`Callable[[Site], bool]`, *optional*): as for `make_plan`.
    """
    if factorized(model):
        raise ConfigError("The model is factorized already; call hf_lowrank.to_dense(model) first.")
    refuse_wrapped(model)
    refuse_quantized(model)
    check_latencies(config)
    plan = make_plan(model, config, available)
    if not plan.sites:
        return model
    refuse_offloaded(model)
    gathered = gather(model, list(plan.members.values()), config, calibration, tokenizer)
    statistics = gathered.statistics
    if statistics is not None:
        statistics.check(plan.statistics_shapes(config.statistics))
    for site in plan.members.values():
        require_finite(site.kind.weight(model, site), f"The weight of {site.name}")
    if config.refine is not None:
        sites = list(plan.members.values())
        config.refine.check(model, sites, arguments_of(model, config.refine, gathered.batches))
    plan = informed_plan(model, config, gathered, available)
    # Everything is computed before anything is replaced, so that a failure leaves the model as it was.
    with _making(model, plan, config, statistics) as make:
        if config.method.anchored:
            made = anchored(model, plan, make, gathered.batches)
        else:
            made = {name: one for site in plan.sites.values() for name, one in make(site).items()}
    if config.refine is not None:
        folder = as_calibration(calibration).folder
        kept = None if folder is None else os.path.join(folder, "refine")
        made = refined(model, plan, made, config, gathered.batches, kept)
    for site in plan.members.values():
        put(model, site, made.pop(site.name))
    describe(model, config, gathered.provenance)
    return model


def describe(model, config, provenance):
    """Let the transformers models in `model` that hold factors be saved as factorized ones.

    Args:
        model (`torch.nn.Module`): factorized.
        config ([`LowRankConfig`]): how; its `recipe` becomes part of what is saved.
        provenance (`dict`, *optional*): JSON that describes the calibration data.
    """
    config.record(model, provenance)
    for _, part in outermost_pretrained(model):
        if factorized(part):
            attach(part, config)


@contextmanager
def _making(model, plan, config, statistics):
    """The function that makes the factors of one weight or group, `{member: Made}`; inside, it shows its progress."""
    progress, specs = Progress(len(plan.sites)), plan.specs()

    @torch.no_grad()
    def make(site, anchors=None):
        progress.start(site.name)
        weight = site.kind.weight(model, site)
        rank = plan.ranks[site.name]
        tensors, shift, error = factorize_site(site, weight, rank, config, statistics, weight.dtype, anchors)
        progress.done()
        return {
            member.name: Made(
                {**specs[member.name], "relative_error": error},
                tensors[member.name],
                _shifted(model, member, shift, weight.dtype),
            )
            for member in site.members
        }

    try:
        yield make
    finally:
        progress.close()


def refuse_wrapped(model):
    """Layers of adapters are linears too, and not those of the model; hooks of compiled modules do not run."""
    # Where nobody has imported PEFT, there are no adapters.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules():
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            raise TargetError(
                f"{name or 'The model'} carries adapters; call `merge_and_unload()` first, or factorize the model and "
                "add the adapter then."
            )
        if is_compiled_module(module):
            raise TargetError(
                f"{name or 'The model'} is compiled; give what was compiled, its `_orig_mod`, and compile afterwards."
            )


def refuse_quantized(model):
    """Weights that another quantizer packs are not there to be factorized; those out of GGUF files are unpacked."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method not in (QUANT_METHOD, "gguf"):
        raise ConfigError(
            f"The model is quantized with {quantizer.quantization_config.quant_method}; factorize the model it was "
            "made from."
        )


def _shifted(model, site, shift, dtype):
    """The new bias, `None` where the bias moves as it is."""
    if shift is None:
        return None
    bias = site.kind.bias(model, site)
    return shifted_bias(site, bias, shift, dtype if bias is None else bias.dtype)


def collect_statistics(
    model,
    calibration="self",
    tokenizer=None,
    method="kfac_svd",
    target_modules="all-linear",
    exclude_modules=None,
    seed=0,
    accelerator=None,
    allocation=None,
):
    """Run calibration data through a dense model and return what `method` needs to know.

    Args:
        model (`PreTrainedModel`): dense, in memory or dispatched over devices and disk.
        calibration (defaults to `"self"`): as `calibration` of [`LowRankConfig`].
        tokenizer (*optional*): for texts; by default the one at `model.name_or_path`.
        method (`str` or [`Method`], defaults to `"kfac_svd"`): decides which statistics.
        target_modules (defaults to `"all-linear"`): as in [`LowRankConfig`].
        exclude_modules (*optional*): as in [`LowRankConfig`].
        seed (`int`, defaults to 0): of everything random.
        accelerator (`accelerate.Accelerator`, *optional*): share the work out among the processes that
            `accelerate launch` has started, each with the whole model and given the same arguments. Each runs, or
            samples, its own part of the data, and all return the statistics of all of it.
        allocation (*optional*): as in [`LowRankConfig`], for one that reads statistics of its own (`"sensitivity"`).

    Returns:
        [`Statistics`]; `.save("statistics.safetensors")` keeps it, and `calibration="statistics.safetensors"` uses it.

    Raises:
        TargetError: targets that there are not, adapters on the model, or a model that is compiled.
        CalibrationError: data that does not fit the model, or a method that needs none.
    """
    check_model(model)
    targets = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    recipe = Recipe(method=method, allocation=allocation, seed=seed, **targets)
    if not recipe.needs_statistics:
        raise CalibrationError(f"`method`={recipe.method.name!r} needs no statistics.")
    calibration = as_calibration(calibration)
    refuse_uncollectable(recipe, calibration)
    processes, model = processes_for(accelerator, model, calibration)
    refuse_wrapped(model)
    sites = match_sites(model, target_modules, exclude_modules)
    if not sites:
        raise TargetError(
            f"`target_modules`={target_modules!r} leaves no linear layer of this {type(model).__name__} after "
            f"`exclude_modules`={exclude_modules!r}; widen the one or narrow the other."
        )
    tokenizer = tokenizer_for(model, tokenizer)
    return collect_for(model, sites, recipe, calibration, tokenizer, processes=processes)


def to_dense(model):
    """Multiply the factors out, in place: an ordinary transformers model again, which loads without hf_lowrank.

    Args:
        model (`torch.nn.Module`): factorized; others are returned as they are.

    Returns:
        The same model (of a factorized layer, a dense one), with weights of the original shapes and the error of the
        factorization in them. Layers whose
        bias was added by a method (`feature_pca`) keep it, with a warning: a dense checkpoint of an architecture
        without biases has no place for it, and loading one would lose it.
    """
    check_model(model)
    refuse_offloaded(model)
    if "" in factorized(model):
        return to_dense(_held(model)).root
    multiply_out(model)
    for _, part in outermost_pretrained(model):
        if isinstance(getattr(part, "hf_quantizer", None), LowRankQuantizer):
            detach(part)
    return model


def refuse_offloaded(model):
    """Weights that are not in memory cannot be worked on."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise LowRankError(
            "Some weights of the model are on disk or on the meta device; load it with "
            "`from_pretrained(..., lowrank_config=...)`, which factorizes while it loads unless `refine` is set, or "
            "without offloading."
        )


def tokenizer_for(model, tokenizer):
    """The function that gives `tokenizer`, or the one at `model.name_or_path`, where text has to be read."""
    return lambda: tokenizer if tokenizer is not None else load_tokenizer(getattr(model, "name_or_path", ""))
