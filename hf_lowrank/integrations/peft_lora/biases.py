"""Biases of factorized layers, which PEFT trains and saves under the names that they have in the dense model.

PEFT looks for a parameter called `bias` in what it adapts; formats keep theirs in a factor or under another name.
"""

import functools
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from ...formats import FormatLinear


# What PEFT puts before the names of the model's own modules.
PREFIX = "base_model.model."


def own_names(model):
    """`{name in the dense model: name here}` of the biases of factorized layers."""
    parameters = {name for name, _ in model.named_parameters()}
    found = {
        f"{name}.bias": f"{name}.{layer.bias_name}"
        for name, layer in model.named_modules()
        if isinstance(layer, FormatLinear)
    }
    return {dense: own for dense, own in found.items() if own in parameters}


def wrap_biases(tuner):
    """Wrap what `peft.tuners.tuners_utils.BaseTuner` does with the option `bias`."""
    mark, saved, loaded = (
        vars(tuner)[name]
        for name in (
            "_mark_only_adapters_as_trainable",
            "_get_learnable_bias_state_dict",
            "_remap_adapter_state_dict_for_load",
        )
    )

    @functools.wraps(mark)
    def mark_trainable(self, model):
        mark(self, model)
        for adapter in self.active_adapters:
            for own in _asked(model, self.peft_config[adapter]).values():
                model.get_parameter(own).requires_grad_(True)

    @functools.wraps(saved.__func__)
    def learnable(cls, model, state_dict, config):
        found = saved.__func__(cls, model, state_dict, config)
        for dense, own in _asked(model, config).items():
            if own in state_dict:
                found.pop(own, None)
                found[dense] = state_dict[own]
        return found

    @functools.wraps(loaded.__func__)
    def remapped(cls, model, config, adapter_name, state_dict):
        found = loaded.__func__(cls, model, config, adapter_name, state_dict)
        names = own_names(model)
        # Files have the prefix where the model of an injected adapter does not.
        names |= {PREFIX + dense: PREFIX + own for dense, own in names.items()}
        return {names.get(key, key): tensor for key, tensor in found.items()}

    tuner._mark_only_adapters_as_trainable = mark_trainable
    tuner._get_learnable_bias_state_dict = classmethod(learnable)
    tuner._remap_adapter_state_dict_for_load = classmethod(remapped)


def wrap_load_adapter():
    """Wrap `PreTrainedModel.load_adapter`, by which transformers loads an adapter past PEFT."""
    original = PreTrainedModel.load_adapter

    @functools.wraps(original)
    def load_adapter(self, *args, **kwargs):
        plain = self._load_pretrained_model

        def load(model, state_dict, checkpoint_files, load_config, **others):
            # Here the adapter is on the model, and layers are called what its file calls them.
            renamed = [WeightRenaming(f"^{dense}$", own) for dense, own in own_names(model).items() if dense != own]
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or ()), *renamed])
            return plain(model, state_dict, checkpoint_files, load_config, **others)

        self._load_pretrained_model = load
        try:
            return original(self, *args, **kwargs)
        finally:
            del self._load_pretrained_model

    PreTrainedModel.load_adapter = load_adapter


def _asked(model, config):
    """Those of [`own_names`] that the `bias` of a configuration is about."""
    ends = {"none": None, "all": ".bias"}.get(getattr(config, "bias", "none"), ".base_layer.bias")
    return {} if ends is None else {dense: own for dense, own in own_names(model).items() if dense.endswith(ends)}
