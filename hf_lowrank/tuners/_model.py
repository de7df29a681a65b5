import copy
from contextlib import contextmanager

from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from ..errors import ConfigError, LowRankError
from ._merge import check_mergeable, settle


class FactorTuner(BaseTuner):
    """A model with adapters of one kind: PEFT's part of a tuner, alike for all of ours.

    A subclass names its `prefix` and its `tuner_layer_cls`, a [`FactorTunerLinear`] with `update_layer(adapter_name,
    module_name, config)` and the static `check(module_name, base, config)`, which refuses what `update_layer` could
    not do.

    Class attributes:
        identity_at_start (`bool`): whether a new adapter changes no bit of the output.
        merges_into_factors (`bool`): whether it merges into factorized layers; otherwise that is refused.
        additive (`bool`): whether the updates of several active adapters add up; otherwise one is active at a time.
        branches (`tuple`): what a training step can draw from (values of `TwoBranches.drawn`); empty without draws.
    """

    identity_at_start = True
    merges_into_factors = True
    additive = True
    branches = ()

    # `target_modules` has a default, so that none have to be guessed from the name of an architecture.
    target_module_mapping = {}

    def _prepare_adapter_config(self, peft_config, model_config):
        # PEFT would expand "all-linear" only after `_prepare_model`, whose checks need the names.
        named = peft_config.target_modules
        peft_config = tuners_utils._maybe_include_all_linear_layers(peft_config, self.model)
        if peft_config.target_modules != named and peft_config.layers_to_transform is not None:
            peft_config.target_modules = _in_layers(peft_config)
        return peft_config

    def _prepare_model(self, peft_config, model):
        for name, _, base in self._targets(peft_config, model):
            with naming(name):
                self.tuner_layer_cls.check(name, base, peft_config)

    def _targets(self, peft_config, model):
        """`(name, module, base layer)` of all targets; the last two differ where there is an adapter already."""
        inside = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name):
                yield name, module, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, self.tuner_layer_cls):
            self._update_layer(target, adapter_name, current_key, peft_config)
        else:
            layer = self.tuner_layer_cls(target)
            self._update_layer(layer, adapter_name, current_key, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _update_layer(self, layer, adapter_name, module_name, config):
        layer.update_layer(adapter_name, module_name, config)

    def _check_merge_allowed(self):
        # All layers, before the first is changed.
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                with naming(name):
                    check_mergeable(module.get_base_layer())

    def _replace_module(self, parent, child_name, new_module, child):
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: PEFT would write the weight back, which a factorized layer computes.
            setattr(parent, child_name, new_module)
            settle(new_module)


def _in_layers(config):
    """Those of the full names in `target_modules` that `layers_to_transform` is about.

    PEFT asks for the layer only where a target is named by its suffix.

    Raises:
        ConfigError: there are none.
    """
    by_suffix = copy.copy(config)
    by_suffix.target_modules = {name.rpartition(".")[2] for name in config.target_modules}
    found = {name for name in config.target_modules if tuners_utils.check_target_module_exists(by_suffix, name)}
    if not found:
        raise ConfigError(
            f"`layers_to_transform`={config.layers_to_transform!r} leaves none of {len(config.target_modules)} linear "
            f"layers, such as {min(config.target_modules)}; give indices of layers that are there."
        )
    return found


@contextmanager
def naming(name):
    """Errors inside come out with the name of a module in front."""
    try:
        yield
    except LowRankError as error:
        raise type(error)(f"{name}: {error}") from error
