"""What the arguments of `from_pretrained` ask for, and what the checkpoint they name has to say to it."""

import copy
import logging

from transformers import PreTrainedConfig

from ..errors import ConfigError
from ..methods import METHODS
from .config import QUANT_METHOD, LowRankConfig
from .inner import as_inner, method_of


logger = logging.getLogger(__name__)

# Arguments that say where a repository is; the tokenizer is looked for in the same place.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def requested(lowrank_config, kwargs):
    """A copy of the configuration the caller asks for, under either keyword, or `None`."""
    other = kwargs.get("quantization_config")
    if lowrank_config is None:
        if isinstance(other, LowRankConfig):
            return other.again()
        if isinstance(other, dict) and other.get("quant_method") == QUANT_METHOD:
            return LowRankConfig.from_dict(other).again()
        return None
    if isinstance(other, LowRankConfig):
        raise ConfigError(
            "Give a LowRankConfig as either `lowrank_config` or `quantization_config`, not both; beside the first, "
            "the second says how factors are quantized, such as TorchAoConfig(Int8WeightOnlyConfig())."
        )
    if isinstance(lowrank_config, dict):
        config = LowRankConfig.from_dict(lowrank_config).again()
    elif isinstance(lowrank_config, LowRankConfig):
        config = lowrank_config.again()
    else:
        raise ConfigError(f"`lowrank_config` must be a LowRankConfig or a dict, not {type(lowrank_config).__name__}.")
    if other is not None:
        config.inner = as_inner(other)
    return config


def check(config, stored):
    """Refuse what cannot be done to a checkpoint that is quantized by the method `stored`, or `None`."""
    if stored not in (None, QUANT_METHOD):
        raise ConfigError(
            f"The checkpoint is quantized with {stored!r}, and its weights cannot be factorized as they are. Load the "
            "model it was made from with `lowrank_config`, and add `quantization_config` to quantize the factors; or "
            "keep it, and let hf_lowrank.residual_adapter put back what quantizing took."
        )
    if stored is not None or config.inner is None:
        return
    if config.compares:
        raise ConfigError(
            "`quantization_config` cannot go with a `refine` or a `method` that compares the factorized with the "
            "dense model; factorize without it and save, then load that with `quantization_config`."
        )
    if config.target_bytes is not None:
        logger.warning(
            "`target_bytes`=%d counts the factors before they are quantized; the model becomes smaller than that.",
            config.target_bytes,
        )


def quantizing(cls, args, kwargs, inner):
    """`(kwargs, config)` that load a factorized checkpoint and quantize its factors by `inner` on the way."""
    found = copy.deepcopy(model_config(cls, args, kwargs))
    stored = found.quantization_config
    config = LowRankConfig.from_dict(stored) if isinstance(stored, dict) else copy.copy(stored)
    if config.inner is None:
        config.inner = as_inner(inner)
        # transformers takes for ordinary, and passes on, what does not say that it is quantized.
        del found.quantization_config
    # Else the checkpoint's own quantization wins, with a warning by transformers.
    return {**kwargs, "config": found, "quantization_config": config}, config


def telling(args, kwargs):
    """`kwargs`, with a config that says how the checkpoint is factorized where the caller's own does not."""
    config, where = kwargs.get("config"), path(args, kwargs)
    if not isinstance(config, PreTrainedConfig) or where is None or kwargs.get("gguf_file") is not None:
        return kwargs
    if getattr(config, "quantization_config", None) is not None:
        return kwargs
    # transformers warns of `trust_remote_code` where no code can come from.
    arguments = {key: value for key, value in hub_arguments(kwargs).items() if key != "trust_remote_code"}
    try:
        found, _ = PreTrainedConfig.get_config_dict(where, **arguments)
    except OSError:
        # Weights alone: the caller's config is all there is.
        return kwargs
    described = found.get("quantization_config")
    if described is None or method_of(described) != QUANT_METHOD:
        return kwargs
    config = copy.deepcopy(config)
    config.quantization_config = described
    return {**kwargs, "config": config}


def stored_method(cls, args, kwargs):
    """How the checkpoint is quantized, by the name of the method, or `None`."""
    stored = getattr(model_config(cls, args, kwargs), "quantization_config", None)
    return None if stored is None else method_of(stored)


def model_config(cls, args, kwargs):
    """The model's config as `from_pretrained` would see it."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    return cls.config_class.from_pretrained(config or path(args, kwargs), **hub_arguments(kwargs))


def hub_arguments(kwargs):
    """Those of `kwargs` that say where a repository is."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}


def path(args, kwargs):
    """The name or folder of the model."""
    return args[0] if args else kwargs.get("pretrained_model_name_or_path")


def refuse_start(method):
    """Raise [`ConfigError`] for a method that would put random factors in the place of a checkpoint's weights."""
    if method.initialises:
        raise ConfigError(
            f"`method`={method.name!r} starts from scratch, and the weights of the checkpoint would be lost. Build "
            "the model with `from_config` and call hf_lowrank.factorize(model, config). For trained weights in the "
            f"same format, use a method that approximates them, such as {_approximates(method)}."
        )


def _approximates(method):
    """The names of methods that store trained weights in the format of `method`."""
    names = [name for name in METHODS.names() if METHODS[name].format == method.format]
    names = [name for name in names if not METHODS[name]().initialises]
    return ", ".join(f"{name!r}{' with its default options' if name == method.name else ''}" for name in names)
