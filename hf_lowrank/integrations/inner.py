"""The configuration of the quantizer that packs factors: which it can be, and what it asks of ranks."""

from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError


# Quantizers of linears that load, save and load again here with the same logits.
INNER = ("torchao", "bitsandbytes")


def as_inner(config):
    """A configuration that can be an inner one, from what a user gives as `quantization_config`.

    Raises:
        ConfigError: it is no configuration, or one of a quantizer that cannot take factors.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    if not isinstance(config, QuantizationConfigMixin):
        raise ConfigError(
            f"`quantization_config` must be a transformers quantization config or a dict, not {type(config).__name__}."
        )
    if method_of(config) not in INNER:
        raise ConfigError(
            f"`quantization_config` is for {method_of(config)!r}, which does not quantize factors while they load; "
            f"{list(INNER)} do. Leave it out to keep the factors as they are."
        )
    return config


def method_of(config):
    """The name of the method of a quantization config, or of the dict it is in a file."""
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return getattr(method, "value", method)


def group_size(config):
    """How many numbers of a row share a scale in a configuration of torchao; 1 where rows are not divided."""
    kind = getattr(config, "quant_type", None)
    found = getattr(kind, "group_size", None) or getattr(getattr(kind, "granularity", None), "group_size", None)
    return found or 1
