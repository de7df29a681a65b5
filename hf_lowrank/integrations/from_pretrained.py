"""The `lowrank_config=` keyword of `from_pretrained`, and the calibration pass that some methods need before it."""

import contextlib
import copy
import functools
import os
import tempfile
import warnings

from transformers import PreTrainedModel

from ..errors import ConfigError
from ..surgery import all_sites
from .calibration import as_calibration, check_calibration, load_tokenizer
from .config import QUANT_METHOD
from .planning import check_latencies, gather, informed_plan, saved_for
from .request import check, hub_arguments, path, quantizing, refuse_start, requested, stored_method, telling
from .session import Rehearsed, Session, Stopped
from .verbs import factorize_in_memory


def install_keyword():
    """Teach `PreTrainedModel.from_pretrained` the keyword; idempotent."""
    original = PreTrainedModel.from_pretrained.__func__
    if hasattr(original, "lowrank_keyword"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, *args, lowrank_config=None, **kwargs):
        load = functools.partial(original, cls)
        kwargs = telling(args, kwargs)
        config, other = requested(lowrank_config, kwargs), kwargs.get("quantization_config")
        if config is not None:
            return _load(load, cls, config, args, kwargs)
        if other is not None and stored_method(cls, args, kwargs) == QUANT_METHOD:
            return _load_quantizing(load, cls, other, args, kwargs)
        return load(*args, **kwargs)

    from_pretrained.lowrank_keyword = True
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _load(load, cls, config, args, kwargs):
    if kwargs.get("gguf_file") is not None:
        raise ConfigError(
            "A GGUF file cannot be factorized while it loads, since transformers has its own quantizer at work there; "
            "load it without `lowrank_config`, then call hf_lowrank.factorize(model, config)."
        )
    stored = stored_method(cls, args, kwargs)
    check(config, stored)
    if stored is not None and config.inner is not None:
        warnings.warn(
            "The checkpoint is factorized already: `lowrank_config` is ignored, and `quantization_config` quantizes "
            "the factors it holds.",
            stacklevel=3,
        )
        return _load_quantizing(load, cls, config.inner, args, kwargs)
    kwargs = {**kwargs, "quantization_config": config}
    session = config.session = _session(kwargs)
    # Data does not belong into a config, which is copied at will and kept with the model.
    calibration, config.calibration = as_calibration(config.calibration), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_removing_new_files(session.offload_folder))
        # A factorized checkpoint wins, with a warning by transformers: calibrating would be for nothing.
        if stored is None:
            refuse_start(config.method)
            check_latencies(config)
            if config.compares:
                return _load_compared(load, config, calibration, args, kwargs)
            if config.needs_statistics or config.needs_probe:
                calibrate(load, config, calibration, args, kwargs, stack)
            if config.needs_curves and session.measured.ranks is None:
                _measure(load, config, args, kwargs)
        return _load_once(load, args, kwargs)


def _session(kwargs):
    return Session(
        key_mapping=kwargs.get("key_mapping"),
        offload_folder=kwargs.get("offload_folder"),
        given_keys=None if kwargs.get("state_dict") is None else list(kwargs["state_dict"]),
    )


def _load_quantizing(load, cls, inner, args, kwargs):
    """Load the factors of a checkpoint, quantized by `inner`."""
    kwargs, config = quantizing(cls, args, kwargs, inner)
    config.session = _session(kwargs)
    return _load_once(load, args, kwargs)


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
        lambda: load_tokenizer(path(args, kwargs), **hub_arguments(kwargs)),
        lambda site: site.weight_name not in info["missing_keys"],
    )
    return (model, info) if wanted else model


def _load_once(load, args, kwargs):
    try:
        return load(*args, **kwargs)
    except Stopped as stopped:
        failure = stopped.failure
    try:
        # Out here, so that it has no context of which nobody knows.
        raise failure
    finally:
        # Its traceback holds this frame, and the tensors that were at work.
        del failure


def _measure(load, config, args, kwargs):
    """A pass over the checkpoint that leaves nothing but the error curve of every weight, for the allocator."""
    session = config.session
    session.measured.curves, session.measuring = {}, True
    _load_once(load, args, {**kwargs, "quantization_config": copy.deepcopy(config)})
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


def loader(cls):
    """`cls.from_pretrained` as transformers has it, without the keyword."""
    return functools.partial(PreTrainedModel.from_pretrained.__func__.__wrapped__, cls)


def rehearse(load, config, args, kwargs):
    """[`Rehearsed`]: what would be loaded. Refuses what cannot work before any weight is read.

    Args:
        load (`Callable`): `from_pretrained` of some class, see [`loader`].
        config ([`LowRankConfig`]): with a session.
        args (`tuple`): positional arguments of `load`.
        kwargs (`dict`): its other arguments.
    """
    config.session.rehearsing = True
    try:
        load(*args, **{**kwargs, "quantization_config": copy.deepcopy(config)})
    except Rehearsed as rehearsed:
        return rehearsed
    finally:
        config.session.rehearsing = False


def calibrate(load, config, calibration, args, kwargs, stack):
    """Learn what takes data: read statistics, or run the dense model over the data and free it.

    Statistics go into the session, and so do ranks, where the allocator has to look at the dense model's outputs.

    Args:
        load, config, args, kwargs: as of `rehearse`.
        calibration ([`Calibration`]): the data.
        stack (`contextlib.ExitStack`): of what is to be removed at the end of the load.
    """
    session = config.session
    session.statistics = saved_for(config, calibration, kwargs.get("token"))
    if session.statistics is not None:
        session.provenance = session.statistics.provenance
        return
    rehearsed = rehearse(load, config, args, kwargs)
    plan = rehearsed.plan
    if not plan.sites:
        return
    check_calibration(calibration, rehearsed.model)
    del rehearsed

    def tokenizer():
        return load_tokenizer(path(args, kwargs), **hub_arguments(kwargs))

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
