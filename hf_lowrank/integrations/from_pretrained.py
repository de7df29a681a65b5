"""The `lowrank_config=` keyword of `from_pretrained`, and the calibration pass that some methods need before it."""

import contextlib
import copy
import functools
import logging
import os
import tempfile
import warnings

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError
from ..surgery import all_sites
from .calibration import as_calibration, check_calibration, load_tokenizer
from .composite import as_inner, check_groups
from .config import QUANT_METHOD, LowRankConfig
from .planning import gather, informed_plan, saved_for
from .session import Rehearsed, Session
from .verbs import factorize_in_memory


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


def install_keyword():
    """Teach `PreTrainedModel.from_pretrained` the keyword; idempotent."""
    original = PreTrainedModel.from_pretrained.__func__
    if hasattr(original, "lowrank_keyword"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, *args, lowrank_config=None, **kwargs):
        load = functools.partial(original, cls)
        config = _requested(lowrank_config, kwargs)
        if config is not None:
            return _load(load, cls, config, args, kwargs)
        if kwargs.get("quantization_config") is not None and _stored_method(cls, args, kwargs) == QUANT_METHOD:
            kwargs = _quantizing_factors(cls, args, kwargs)
        return load(*args, **kwargs)

    from_pretrained.lowrank_keyword = True
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _requested(lowrank_config, kwargs):
    """A copy of the configuration the caller asks for, under either keyword, or `None`."""
    other = kwargs.get("quantization_config")
    if lowrank_config is None:
        if isinstance(other, LowRankConfig):
            return other.again()
        if isinstance(other, dict) and other.get("quant_method") == QUANT_METHOD:
            return LowRankConfig.from_dict(other)
        return None
    if isinstance(other, LowRankConfig):
        raise ConfigError(
            "Give a LowRankConfig as either `lowrank_config` or `quantization_config`, not both; beside the first, "
            "the second says how factors are quantized, such as TorchAoConfig(Int8WeightOnlyConfig())."
        )
    if isinstance(lowrank_config, dict):
        config = LowRankConfig.from_dict(lowrank_config)
    elif isinstance(lowrank_config, LowRankConfig):
        config = lowrank_config.again()
    else:
        raise ConfigError(f"`lowrank_config` must be a LowRankConfig or a dict, not {type(lowrank_config).__name__}.")
    if other is not None:
        config.inner = as_inner(other)
    if config.inner is not None:
        check_groups(config.inner, config)
        if config.target_bytes is not None:
            logger.warning(
                "`target_bytes`=%d counts the factors before they are quantized; the model becomes smaller than that.",
                config.target_bytes,
            )
    return config


def _load(load, cls, config, args, kwargs):
    if kwargs.get("gguf_file") is not None:
        raise ConfigError(
            "A GGUF file cannot be factorized while it loads, since transformers has its own quantizer at work there; "
            "load it without `lowrank_config`, then call hf_lowrank.factorize(model, config)."
        )
    stored = _stored_method(cls, args, kwargs)
    if stored not in (None, QUANT_METHOD):
        raise ConfigError(
            f"The checkpoint is quantized with {stored!r}, and its weights cannot be factorized as they are. Load the "
            "model it was made from with `lowrank_config`, and add `quantization_config` to quantize the factors; or "
            "keep it, and let hf_lowrank.residual_adapter put back what quantizing took."
        )
    if stored is not None and config.inner is not None:
        warnings.warn(
            "The checkpoint is factorized already: `lowrank_config` is ignored, and `quantization_config` quantizes "
            "the factors it holds.",
            stacklevel=3,
        )
        return load(*args, **_quantizing_factors(cls, args, {**kwargs, "quantization_config": config.inner}))
    if stored is None and config.inner is not None and config.compares:
        raise ConfigError(
            "`quantization_config` cannot go with a `refine` or a `method` that compares the factorized with the "
            "dense model; factorize without it and save, then load that with `quantization_config`."
        )
    kwargs = {**kwargs, "quantization_config": config}
    session = config.session = Session(
        key_mapping=kwargs.get("key_mapping"),
        offload_folder=kwargs.get("offload_folder"),
        given_keys=None if kwargs.get("state_dict") is None else list(kwargs["state_dict"]),
    )
    # Data does not belong into a config, which is copied at will and kept with the model.
    calibration, config.calibration = as_calibration(config.calibration), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_removing_new_files(session.offload_folder))
        # A factorized checkpoint wins, with a warning by transformers: calibrating would be for nothing.
        if stored is None:
            if config.compares:
                return _load_compared(load, config, calibration, args, kwargs)
            if config.needs_statistics or config.needs_probe:
                _calibrate(load, config, calibration, args, kwargs, stack)
            if config.needs_curves and session.measured.ranks is None:
                _measure(load, config, args, kwargs)
        return _load_once(load, session, args, kwargs)


def _load_compared(load, config, calibration, args, kwargs):
    """Load the dense model and factorize it in memory, since the compressed model is compared with it."""
    kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
    wanted = kwargs.pop("output_loading_info", False)
    config.session = None
    model, info = load(*args, **kwargs, output_loading_info=True)
    factorize_in_memory(
        model,
        config,
        calibration,
        lambda: load_tokenizer(_path(args, kwargs), **_hub_arguments(kwargs)),
        lambda site: site.weight_name not in info["missing_keys"],
    )
    return (model, info) if wanted else model


def _load_once(load, session, args, kwargs):
    try:
        return load(*args, **kwargs)
    except RuntimeError:
        # transformers collects errors of single tensors and raises one of its own at the end.
        if session.failure is not None:
            raise session.failure from None
        raise


def _measure(load, config, args, kwargs):
    """A pass over the checkpoint that leaves nothing but the error curve of every weight, for the allocator."""
    session = config.session
    session.measured.curves, session.measuring = {}, True
    _load_once(load, session, args, {**kwargs, "quantization_config": copy.deepcopy(config)})
    session.measuring = False


@contextlib.contextmanager
def _removing_new_files(folder):
    """A load that fails takes back what it has written into the offload folder."""
    before = set(os.listdir(folder)) if folder is not None and os.path.isdir(folder) else set()
    done = False
    try:
        yield
        done = True
    finally:
        if not done and folder is not None and os.path.isdir(folder):
            for name in set(os.listdir(folder)) - before:
                if name.endswith(".safetensors"):
                    os.remove(os.path.join(folder, name))


def _model_config(cls, args, kwargs):
    """The model's config as `from_pretrained` would see it."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    return cls.config_class.from_pretrained(config or _path(args, kwargs), **_hub_arguments(kwargs))


def _hub_arguments(kwargs):
    return {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}


def _path(args, kwargs):
    return args[0] if args else kwargs.get("pretrained_model_name_or_path")


def _stored_method(cls, args, kwargs):
    """How the checkpoint is quantized, by the name of the method, or `None`."""
    stored = getattr(_model_config(cls, args, kwargs), "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return getattr(method, "value", method)


def _quantizing_factors(cls, args, kwargs):
    """`kwargs` whose `quantization_config` quantizes the factors of a checkpoint while they load."""
    model_config = copy.deepcopy(_model_config(cls, args, kwargs))
    stored = model_config.quantization_config
    config = LowRankConfig.from_dict(stored) if isinstance(stored, dict) else copy.copy(stored)
    if config.inner is not None:
        # Both are given, and those of the checkpoint win, with a warning by transformers.
        return {**kwargs, "quantization_config": config}
    config.inner = as_inner(kwargs["quantization_config"])
    # What is not there when it is read is quantized on the way.
    del model_config.quantization_config
    return {**kwargs, "config": model_config, "quantization_config": config}


def _rehearse(load, config, args, kwargs):
    """`(dense skeleton, plan)` of what would be loaded; refuses what cannot work before any weight is read."""
    config.session.rehearsing = True
    try:
        load(*args, **{**kwargs, "quantization_config": copy.deepcopy(config)})
    except Rehearsed as rehearsed:
        return rehearsed.model, rehearsed.plan
    finally:
        config.session.rehearsing = False


def _calibrate(load, config, calibration, args, kwargs, stack):
    """Learn what takes data: read statistics, or run the dense model over the data and free it.

    Statistics go into the session, and so do ranks, where the allocator has to look at the dense model's outputs.
    """
    session = config.session
    session.statistics = saved_for(config, calibration, kwargs.get("token"))
    if session.statistics is not None:
        session.provenance = session.statistics.provenance
        return
    skeleton, plan = _rehearse(load, config, args, kwargs)
    if not plan.sites:
        return
    check_calibration(calibration, skeleton)
    del skeleton

    def tokenizer():
        return load_tokenizer(_path(args, kwargs), **_hub_arguments(kwargs))

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_lowrank_"))
    dense_kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
    dense_kwargs["output_loading_info"] = True
    if session.offload_folder is not None:
        dense_kwargs["offload_folder"] = os.path.join(folder, "offload")
    model, info = load(*args, **dense_kwargs)
    wanted = set(plan.members)
    sites = [site for site in all_sites(model) if site.name in wanted]
    gathered = gather(model, sites, config, calibration, tokenizer)
    session.statistics, session.provenance = gathered.statistics, gathered.provenance
    if config.needs_probe:
        plan = informed_plan(model, config, gathered, lambda site: site.weight_name not in info["missing_keys"])
        session.measured.ranks = {**dict.fromkeys(plan.dense), **plan.ranks}
