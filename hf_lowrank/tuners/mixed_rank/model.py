import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ConfigError
from ...factorize import site_factors
from ...formats import FormatLinear
from ...integrations.config import LowRankConfig
from ...integrations.peft_lora.biases import PREFIX
from ...integrations.planning import gather, informed_plan
from ...integrations.verbs import describe, refuse_offloaded, refuse_quantized
from ...linalg import require_finite
from ...methods import Factors
from ...plan import make_plan
from .._model import FactorTuner, naming
from .layer import MixedRankLinear, only_one


# The attribute of a configuration whose `ranks` were found here, and not read from a file.
MADE = "_ranks_made"


class MixedRankModel(FactorTuner):
    """A model with mixed-rank layers; made by `peft.get_peft_model(model, MixedRankConfig(...))`.

    Args:
        model (`torch.nn.Module`): its targeted weights are factorized here, where they are dense.
        config ([`MixedRankConfig`]): how.
        adapter_name (`str`): the name of the first.
    """

    prefix = "mixed_rank_"
    tuner_layer_cls = MixedRankLinear
    identity_at_start = False
    additive = False
    branches = (True, False)

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        # The ranks found here belong to this model and adapter; the user's configuration stays as it was.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if vars(config).pop(MADE, False):
            config.ranks = None
        # PEFT asks for empty parameters by argument, or by a context in which every new one is.
        empty = kwargs.get("low_cpu_mem_usage") or nn.ParameterList([torch.empty(1)])[0].is_meta
        if empty and config.ranks is None:
            raise ConfigError(
                "`low_cpu_mem_usage`=True leaves new parameters empty until a file is loaded; factors of a new "
                "adapter are made from the weights, so leave it out."
            )
        if config.ranks is None and any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
            raise ConfigError(
                "An adapter is merged, and factors of a new one would be made from the merged weights; call "
                "`unmerge_adapter()` first."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_model(self, peft_config, model):
        dense, factorized = {}, {}
        for name, module, base in self._targets(peft_config, model):
            own = name.removeprefix(PREFIX)
            with naming(own):
                if isinstance(module, BaseTunerLayer) and not isinstance(module, MixedRankLinear):
                    raise ConfigError(
                        f"it carries an adapter of another tuner ({type(module).__name__}), which factors in the "
                        "place of the weight would hide; call `merge_and_unload()` or `unload()` first."
                    )
                self.tuner_layer_cls.check(own, base, peft_config)
            if isinstance(base, FormatLinear):
                factorized[own] = base
            else:
                dense[own] = own if base is module else f"{own}.base_layer"
        self._factors = {}
        if peft_config.ranks is None and (dense or factorized):
            self._factors = _all_factors(self.model, dense, factorized, peft_config)
            peft_config.ranks = {name: factors.left.shape[1] for name, factors in self._factors.items()}
            vars(peft_config)[MADE] = True

    @staticmethod
    def _check_target_module_exists(config, key):
        # Of an adapter that is there, the layers whose factors would not have been smaller are no targets.
        found = FactorTuner._check_target_module_exists(config, key)
        return found and (config.ranks is None or key.removeprefix(PREFIX) in config.ranks)

    def _update_layer(self, layer, adapter_name, module_name, config):
        name = module_name.removeprefix(PREFIX)
        layer.update_layer(adapter_name, config, config.ranks[name], self._factors.pop(name, None))

    def set_adapter(self, adapter_name, inference_mode=False):
        # Before any layer is touched.
        only_one([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        """The model with the factors in place of the dense weights: saved and loaded as any factorized one.

        Args:
            progressbar (`bool`, defaults to `False`): whether to show one.
            safe_merge (`bool`, defaults to `False`): PEFT's argument; factors that are not finite are always refused.
            adapter_names (`list[str]`, *optional*): one name; the active adapter by default.

        Returns:
            The model that was adapted, changed in place.
        """
        name = self._to_merge(adapter_names)
        config = self.peft_config[name] if name else None
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if config is not None and getattr(model, "hf_quantizer", None) is None:
            recipe = config.recipe()
            given = {"rank_pattern": recipe.rank_pattern, "rank_multiple": recipe.rank_multiple}
            budget = {"rank": recipe.rank, "param_ratio": recipe.param_ratio}
            targets = {"target_modules": sorted(config.ranks), "allocation": recipe.allocation}
            described = LowRankConfig(method=recipe.method, format=recipe.format, **given, **budget, **targets)
            describe(model, described, None)
        return model

    def _to_merge(self, names):
        """The one adapter that merging `names` is about, what is merged already included; `None` of none."""
        if names is None:
            names = self.active_adapters
        elif isinstance(names, str) or not set(names) <= self.peft_config.keys():
            raise ConfigError(
                f"`adapter_names`={names!r} must be a list of names of adapters; there are {sorted(self.peft_config)}."
            )
        layers = (module for module in self.model.modules() if isinstance(module, MixedRankLinear))
        merged = {name for layer in layers for name in layer.merged_adapters}
        return only_one(sorted(merged.union(names)))


def _all_factors(model, dense, factorized, config):
    """`{name: Factors}` of the targets that are adapted: made of dense ones, and those that factorized ones have.

    Args:
        model (`torch.nn.Module`): what holds the targets.
        dense (`dict[str, str]`): targets as for [`_make_factors`].
        factorized (`dict[str, FormatLinear]`): targets that are factorized already.
        config ([`MixedRankConfig`]): how.

    Raises:
        LowRankError: of the kind that fits; also if nothing is left to adapt.
    """
    # A key that is there for factorized layers alone matches none of those that are factorized now.
    keys = {config.key_for(name) for name in factorized} - {config.key_for(name) for name in dense}
    pattern = {key: rank for key, rank in config.rank_pattern.items() if key not in keys}
    made = _make_factors(model, dense, pattern, config) if dense else {}
    for name, layer in factorized.items():
        if config.rank_pattern.get(config.key_for(name)) != "dense":
            made[name] = Factors(*layer.factors(), None)
    if not made:
        raise ConfigError(
            f"At this budget (`r`={config.r}, `param_ratio`={config.param_ratio}) the factors of none of the "
            f"{len(dense) + len(factorized)} targeted layers are smaller than their weights; lower it, or "
            "`rank_multiple`."
        )
    return made


@torch.no_grad()
def _make_factors(model, targets, pattern, config):
    """`{name: Factors}` of the targets that become smaller; empty if there are none.

    Args:
        model (`torch.nn.Module`): dense at the targets.
        targets (`dict[str, str]`): `{name: name of the dense layer}`; they differ where an adapter is there already.
        pattern (`dict[str, int | "dense"]`): `rank_pattern` of the targets.
        config ([`MixedRankConfig`]): how.

    Raises:
        LowRankError: of the kind that fits.
    """
    refuse_quantized(model)
    refuse_offloaded(model)
    names = {dense: name for name, dense in targets.items()}
    # The dense layer inside an adapter has the rank that is given for the layer.
    pattern = {rf"({key})(\.base_layer)?": rank for key, rank in pattern.items()}
    recipe = config.recipe(target_modules=sorted(names), rank_pattern=pattern)
    plan = make_plan(model, recipe)
    if not plan.sites:
        return {}
    gathered = gather(model, list(plan.sites.values()), recipe, config.statistics, None)
    if gathered.statistics is not None:
        gathered.statistics.check(plan.statistics_shapes(recipe.statistics))
    plan, made = informed_plan(model, recipe, gathered), {}
    for site in plan.sites.values():
        weight = site.kind.weight(model, site)
        (factors,) = site_factors(site, weight, plan.ranks[site.name], recipe, gathered.statistics)
        left, right = (factor.to(weight) for factor in (factors.left, factors.right))
        for factor in (left, right):
            require_finite(factor, f"A factor of {site.name} in {weight.dtype}")
        made[names[site.name]] = Factors(left, right, factors.relative_error)
    return made
