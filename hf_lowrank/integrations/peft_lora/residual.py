"""A LoRA adapter that puts back what compression lost, in closed form."""

import os
import re

import torch
from safetensors import safe_open
from torch import nn

from ...checks import check_integer
from ...errors import CheckpointError, ConfigError, LowRankError, TargetError
from ...formats import FormatLinear, is_packed, plain
from ...linalg import balanced
from ...methods import METHODS
from ...statistics import Statistics
from ...surgery import all_sites, factorized, matches
from ..checkpoint import stored_keys
from .require import require_peft


def residual_adapter(model, dense, rank=16, method=None, statistics=None, target_modules=None, adapter_name="default"):
    r"""Fill a LoRA adapter with the leading part of what compression took from each weight.

        min_{rank k} tr((E - B A) C (E - B A)^T),    E = W - W',    C = X^T X,
        U = eig_k(E C E^T),    B = U,    A = U^T E

    for `method="whitened_svd"`, without any inverse; `"kfac_svd"` weighs the outputs too, `"svd"` is `C = I`, and any
    other method that takes weights one at a time minimises its own objective. `W'` is what the layer applies: the
    product of factors, or what a quantized weight stands for. Nothing is trained.

    Args:
        model (`torch.nn.Module`): compressed, in memory; adapters of other names may be on it.
        dense (`torch.nn.Module` or `str`): what it was made from, as a model or as a folder of safetensors, which is
            read one tensor at a time.
        rank (`int`, defaults to 16): of the adapter, at least 1; capped at `min(out, in)` of a layer.
        method (`str` or [`Method`], *optional*): the metric; `"whitened_svd"` with statistics, else `"svd"`.
        statistics ([`Statistics`] or `str`, *optional*): of the dense model, from
            `hf_lowrank.collect_statistics(dense, ..., method=...)`; or the file that holds them.
        target_modules (`str` or `list[str]`, *optional*): layers of `model`, as in PEFT; every factorized layer, or
            every quantized linear of a model without any, by default.
        adapter_name (`str`, defaults to `"default"`): a new one.

    Returns:
        A `PeftModel` around `model`, or `model` itself if it is one. `save_pretrained` writes an ordinary LoRA.

    Raises:
        ConfigError: an argument out of range, or an adapter that is merged.
        TargetError: nothing to correct.
        CheckpointError: `dense` lacks a weight, or holds one of another shape.
        StatisticsError: statistics of another model or method.

    Reference:
        EoRA and QERA (exact), in an inverse-free form of ours. Differs: any metric of the library, and factors as well
        as quantized weights.
    """
    peft = require_peft("residual_adapter")
    check_integer("rank", rank, 1, "residual_adapter")
    statistics = Statistics.load(statistics) if isinstance(statistics, (str, os.PathLike)) else statistics
    method = METHODS.build(method or ("svd" if statistics is None else "whitened_svd"))
    if method.initialises:
        raise ConfigError(f"`method`={method.name!r} approximates nothing; choose another, such as 'svd'.")
    if method.shifts:
        raise ConfigError(f"`method`={method.name!r} shifts biases, which a LoRA has no place for; choose another.")
    if method.only_format:
        raise ConfigError(
            f"`method`={method.name!r} makes what only layers of format {method.format!r} hold, and a LoRA holds two "
            "dense factors; choose another, such as 'svd'."
        )
    if method.statistics and statistics is None:
        raise ConfigError(
            f"`method`={method.name!r} needs `statistics`: hf_lowrank.collect_statistics(dense, ..., "
            f"method={method.name!r}), or take `method='svd'`."
        )
    is_peft = isinstance(model, peft.PeftModel)
    # Of adapters that transformers has injected, the model itself has this attribute.
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(f"`adapter_name`={adapter_name!r} is on the model already; choose another name.")
    base = model.get_base_model() if is_peft else model
    if any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) and m.merged for m in base.modules()):
        raise ConfigError(
            "An adapter is merged, and the residual of merged weights would take it out again; call "
            "`unmerge_adapter()` first."
        )
    layers = _targets(base, target_modules)
    weights = _DenseWeights(dense, base)
    updates = {}
    for name, layer in layers.items():
        found = {} if not method.statistics else statistics.get(name.replace(".base_layer", ""), method.statistics)
        updates[name.replace(".base_layer", "")] = _update(name, layer, weights, method, rank, found)
    ranks = {name: left.shape[1] for name, (left, _) in updates.items()}
    lower = {f"^{re.escape(name)}": found for name, found in ranks.items() if found != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(updates),
        rank_pattern=lower,
        # A scale of 1 everywhere.
        alpha_pattern=lower,
    )
    if is_peft:
        active = list(model.base_model.active_adapters)
        model.add_adapter(adapter_name, config)
        # Beside what was active: it makes up for the base, not for another adapter.
        model.base_model.set_adapter([*active, adapter_name])
    else:
        model = peft.get_peft_model(model, config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, (left, right) in updates.items():
            adapter = base.get_submodule(name)
            adapter.lora_A[adapter_name].weight.copy_(right)
            adapter.lora_B[adapter_name].weight.copy_(left)
    return model


def _targets(model, wanted):
    """`{name: layer}` of what is to be corrected."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FormatLinear)}
    if wanted is None and not layers:
        layers = {name: module for name, module in _linears(model).items() if is_packed(module.weight)}
    if wanted is not None:
        layers = {**_linears(model), **layers}
        layers = {name: layer for name, layer in layers.items() if matches(wanted, name.replace(".base_layer", ""))}
    if not layers:
        others = sum(not kind.single for kind in factorized(model).values())
        why = f"; the {others} weights of experts or convolutions cannot carry one" if others else ""
        raise TargetError(
            f"`target_modules`={wanted!r} leaves nothing to correct: a residual adapter is for factorized layers and "
            f"quantized linears{why}."
        )
    return layers


def _linears(model):
    inside = {id(part) for layer in model.modules() if isinstance(layer, FormatLinear) for part in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and ".lora_" not in name
    }


def _update(name, layer, weights, method, rank, statistics):
    """`(B, A)` for one layer, float64, of equal scale."""
    if isinstance(layer, FormatLinear):
        applied = layer.exact_weight()
    else:
        applied = plain(layer).detach().double()
    dense = weights.read(name.replace(".base_layer", ""), getattr(layer, "transposed", False)).to(applied.device)
    if dense.shape != applied.shape:
        raise CheckpointError(
            f"`dense` has a weight {tuple(dense.shape)} for {name}, which applies one of {tuple(applied.shape)}; give "
            "the model it was made from."
        )
    found = {key: value.to(applied.device) for key, value in statistics.items()}
    try:
        factors = method.factorize(dense.double() - applied, min(rank, *applied.shape), found)
    except LowRankError as error:
        raise type(error)(f"{name}: {error}") from error
    return balanced(factors.left, factors.right)


class _DenseWeights:
    """Dense weights by the names of `model`, `(out, in)`, from a model or a folder of safetensors."""

    def __init__(self, source, model):
        self.prefix = getattr(model, "base_model_prefix", "")
        self.model = source if isinstance(source, nn.Module) else None
        self.files = {}
        if self.model is not None:
            self.sites = {site.name: site for site in all_sites(source)}
            return
        if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
            raise ConfigError(f"`dense`={source!r} is neither a model nor a folder; download the model first.")
        for entry in sorted(os.listdir(source)):
            if entry.endswith(".safetensors"):
                path = os.path.join(source, entry)
                self.files.update(dict.fromkeys(stored_keys([path]), path))

    def read(self, name, transposed):
        """The weight of the layer `name`; `transposed` says that files hold it as `(in, out)`."""
        names = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        if self.model is not None:
            found = next((self.sites[other] for other in names if other in self.sites), None)
            if found is not None:
                weight = found.kind.weight(self.model, found)[0]
                if weight.is_meta:
                    raise ConfigError(f"`dense` is offloaded at {name}; give the folder of its files instead.")
                return weight
        else:
            found = next((f"{other}.weight" for other in names if f"{other}.weight" in self.files), None)
            if found is not None:
                with safe_open(self.files[found], "pt") as file:
                    weight = file.get_tensor(found)
                return weight.T if transposed else weight
        raise CheckpointError(
            f"`dense` has no weight for {name}; give the model it was made from, loaded by transformers if its files "
            "use other names."
        )
