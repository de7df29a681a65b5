"""A quantizer around another one: whatever is to be packed goes through the inner quantizer at the end.

transformers loads a model with one quantizer. Factors are ordinary linears, so that any quantizer of linears can take
them from there; this class answers transformers' questions with the answers of that inner quantizer.
"""

import logging

from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from ..errors import ConfigError, ResourceError
from ..formats import is_packed
from ..surgery import factorized


logger = logging.getLogger(__name__)

# By what they refuse a tensor: its shape, its device, a kernel that is not there.
REFUSALS = (AssertionError, ImportError, RuntimeError, TypeError, ValueError)


class Unquantized(HfQuantizer):
    """Stands where there is no inner quantizer: it packs nothing, and nothing speaks against what the model can do."""

    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self):
        return True


class CompositeQuantizer(HfQuantizer):
    """Passes on to `inner`, a transformers quantizer made of `quantization_config.inner`, what transformers asks.

    A subclass does its own work in the hooks it overrides, and leaves the rest to these.
    """

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        wanted = quantization_config.inner
        if wanted is None:
            self.inner = Unquantized(None)
        else:
            self.inner = AutoHfQuantizer.from_config(wanted, pre_quantized=self.pre_quantized)
        self._load_conversions = []

    def validate_environment(self, *args, device_map=None, **kwargs):
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and self.quantization_config.inner is not None:
            raise ResourceError(
                "The device map sends weights to disk, where quantized ones cannot be kept; give more memory in "
                "`max_memory`, or leave out `quantization_config`."
            )
        self.inner.validate_environment(*args, device_map=device_map, **kwargs)

    def update_device_map(self, device_map):
        return self.inner.update_device_map(device_map)

    def update_dtype(self, dtype):
        return self.inner.update_dtype(dtype)

    def update_attn_implementation(self, config):
        return self.inner.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.inner._process_model_before_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model, param_name, **kwargs):
        return self.inner.param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model, param_name, param):
        return self.inner.param_element_size(model, param_name, param)

    def adjust_max_memory(self, max_memory):
        return self.inner.adjust_max_memory(max_memory)

    def update_weight_conversions(self, weight_conversions, model):
        updated = self.inner.update_weight_conversions(weight_conversions, model)
        known = {id(conversion) for conversion in weight_conversions}
        self._load_conversions = [conversion for conversion in updated if id(conversion) not in known]
        return updated

    def get_new_dtype(self, converter, param, dtype):
        return self.inner.get_new_dtype(converter, param, dtype)

    def pack(self, tensors, model, **kwargs):
        """What becomes of parameters, by full name, that are about to be put into `model`.

        Args:
            tensors (`dict[str, torch.Tensor]`): as they would be stored without an inner quantizer.
            kwargs: as an operation of transformers gets them (`config`, `missing_keys`).

        Returns:
            The same with packed tensors; without those that the inner quantizer has put into the model itself.
        """
        packed = {}
        for name, tensor in tensors.items():
            if self.inner.param_needs_quantization(model, name):
                names = {"source_patterns": [name], "target_patterns": [name], "full_layer_name": name}
                operation = self.inner.get_quantize_ops()
                try:
                    packed.update(operation.convert({name: [tensor]}, model=model, **{**kwargs, **names}))
                except REFUSALS as error:
                    raise ConfigError(
                        f"{name} of shape {tuple(tensor.shape)} cannot be quantized by `quantization_config`: "
                        f"{error}. Choose a rank or `rank_multiple` that it can divide, or another configuration."
                    ) from error
            else:
                packed[name] = tensor
        return packed

    def _process_model_after_weight_loading(self, model, **kwargs):
        # These turn what is stored into packed tensors. What is saved is made by `get_state_dict_and_metadata`, and
        # transformers, which would reverse them, cannot.
        ours = {id(conversion) for conversion in self._load_conversions}
        model._weight_conversions = [c for c in model._weight_conversions if id(c) not in ours]
        self.inner._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.inner is not None and not self.pre_quantized:
            _warn_of_unpacked(model)

    def get_state_dict_and_metadata(self, model):
        if self.quantization_config.inner is None:
            _refuse_packed(model)
        try:
            return self.inner.get_state_dict_and_metadata(model)
        except ValueError as error:
            raise ConfigError(
                f"The quantized weights cannot be written to files: {error}. Save the factors unquantized, and give "
                "`quantization_config` whenever they are loaded; or choose a configuration whose tensors can be "
                "written, such as TorchAoConfig(Int8WeightOnlyConfig())."
            ) from error

    def is_serializable(self):
        return self.inner.is_serializable()

    @property
    def is_trainable(self):
        return self.inner.is_trainable

    @property
    def is_qat_trainable(self):
        return self.inner.is_qat_trainable

    @property
    def is_compileable(self):
        return self.inner.is_compileable


def _warn_of_unpacked(model):
    left = [
        name
        for site, kind in factorized(model).items()
        for name, tensor in kind.stored(model, site).items()
        if tensor.ndim > 1 and not is_packed(tensor)
    ]
    if left:
        logger.warning(
            "%d matrices of factors, such as %s, stay as they are: they are of experts, or of a shape that "
            "`quantization_config` leaves alone.",
            len(left),
            left[0],
        )


def _refuse_packed(model):
    name = next((name for name, parameter in model.named_parameters() if is_packed(parameter)), None)
    if name is not None:
        raise ConfigError(
            f"{name} was quantized in memory, and how cannot be told from the model. Save it before it is quantized: "
            "from_pretrained(folder, quantization_config=...) quantizes the factors while it loads them, and what "
            "it returns can be saved."
        )
