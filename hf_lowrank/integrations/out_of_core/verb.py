"""The verb: a dense checkpoint in, a factorized one out, and no model in memory."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from dataclasses import fields, replace
from importlib.metadata import version

from filelock import FileLock, Timeout

from ...errors import CalibrationError, CheckpointError, ConfigError, ResourceError
from ...files import PARTIAL, enough_space, sha256_of
from ...parts import Parts, digest_of_batches
from ...statistics import Statistics
from ...statistics.sequential import CURE
from ..calibration import Calibration, as_calibration, check_calibration
from ..config import LowRankConfig
from ..planning import saved_for
from ..session import Session
from .curves import measure
from .finished import finish, read_checkpoint, read_record, verify_checkpoint
from .recipe_file import write_recipe
from .shards import Shards, split
from .skeleton import Skeleton
from .source import INSTEAD, Source


logger = logging.getLogger(__name__)

LOCK = ".lock"
ONE_PASS = (
    "collect in one pass with hf_lowrank.collect_statistics(model, ...).save(path), or `optimum-cli lowrank calibrate "
    "--in-memory`, and give `calibration=path`"
)


def factorize_checkpoint(source, target, config=None, dtype=None, max_shard_size="50GB", **hub):
    """Factorize a checkpoint into another one, without a model in memory.

    The tensors of `target` are those that `from_pretrained(source, lowrank_config=config)` and `save_pretrained` give,
    bit for bit. Weights are read, factorized and written one after the other, so that memory is that of the largest
    (of a layer's experts together) and of its statistics, with their float64 workspace. `target` appears at the end,
    as a whole. An interrupted call leaves what is finished in `target + ".partial"`, and goes on there when it is
    repeated; it ends in the same files. Everything that is read or written has its sha256 taken, and what has changed
    between two calls is refused by name.

    Args:
        source (`str`): a folder, or a repository on the Hub, with a dense model in safetensors files, of a class of
            transformers.
        target (`str`): a folder that does not exist. It gets the weights, the configs, `recipe.yaml` where everything
            can be written into one, `factorization.json` with all sha256, and the tokenizer's files of `source`.
        config ([`LowRankConfig`], *optional*): how; the default configuration if not given. Statistics are collected
            block by block, in `target + ".partial"` unless [`Calibration`] has a `folder`.
        dtype (*optional*): as of `from_pretrained`; that of `source` by default.
        max_shard_size (`str` or `int`, defaults to `"50GB"`): of one weight file; as of `save_pretrained`.
        hub (*optional*): `revision`, `token`, `cache_dir`: where `source` is on the Hub.

    Returns:
        [`FactorizedCheckpoint`]: print it, or read its `summary`.

    Raises:
        ConfigError: a configuration that takes the whole model, or a target that is there already.
        CheckpointError: a source that is damaged, incomplete, changed since the interrupted call, or of an
            architecture whose weights cannot be read one by one; a damaged part. The message names the file.
        ResourceError: the disk is full; nothing but finished parts stays, and the call can be repeated.
        LowRankError: whatever factorizing may raise.
    """
    config = LowRankConfig() if config is None else config
    if not isinstance(config, LowRankConfig):
        raise ConfigError(f"`config` must be a LowRankConfig, not {type(config).__name__}.")
    config = config.again()
    calibration, config.calibration = _repeatable(as_calibration(config.calibration)), None
    config.session = Session()
    _refuse_whole_models(config)
    split({}, max_shard_size)
    target = os.path.abspath(target)
    there = _is_there(target)
    if there and read_record(target) is None:
        raise _taken(target)
    origin = Source(source, dtype, **hub)
    _check_data(config, calibration, Skeleton(origin, config))
    identity = {
        "recipe": config.to_json(),
        "calibration": _description(calibration) if config.needs_statistics else None,
        "model": [origin.cls.__name__, origin.digest_of_config],
        "dtype": None if dtype is None else str(dtype),
        "max_shard_size": max_shard_size,
        "versions": {name: version(name) for name in ("hf-lowrank", "torch", "transformers")},
    }
    sources = origin.digests()
    run = hashlib.sha256(json.dumps([identity, sources], sort_keys=True).encode()).hexdigest()
    work = f"{target}{PARTIAL}"
    if there:
        _check_finished(target, run)
    else:
        with _alone_in(work), enough_space(target, f"free some space and run again; {work} keeps what is finished"):
            folder = os.path.join(work, "checkpoint")
            os.makedirs(folder, exist_ok=True)
            parts = Parts(os.path.join(work, "parts"), identity, independent=True)
            _begin(parts, sources)
            _gather(origin, config, calibration, work)
            if config.needs_curves:
                measure(origin, config, parts)
            skeleton = Skeleton(origin, config, "Factorizing")
            shards = Shards(skeleton, parts, folder, max_shard_size)
            shards.check_space()
            shards.write()
            write_recipe(folder, config, calibration, dtype, max_shard_size)
            finish(skeleton, shards, folder, {"run": run, "sources": sources})
            if os.path.isdir(target):
                os.rmdir(target)
            os.replace(folder, target)
    # Also after a call that was interrupted right here.
    _clear(work)
    return read_checkpoint(target)


def _repeatable(calibration):
    """Data that can be read again and again, and told from other data."""
    data = calibration.data
    if isinstance(data, Statistics):
        path = getattr(data, "path", None)
        if path is None:
            raise ConfigError(
                "`calibration` is statistics in memory, which an interrupted call could not find again; write them "
                "with .save(path) and give the path."
            )
        return replace(calibration, data=path)
    plain = data is None or isinstance(data, (str, os.PathLike, list, tuple, dict))
    return calibration if plain else replace(calibration, data=list(data))


def _refuse_whole_models(config):
    for argument, value, needs in (
        ("refine", config.refine, config.refine is not None),
        ("method", config.method, config.method.anchored),
        ("allocation", config.allocation, config.needs_probe),
    ):
        if needs:
            raise ConfigError(
                f"`{argument}`={value.name!r} runs the whole dense and the compressed model, which are not in memory "
                f"here; choose another, or {INSTEAD}."
            )
    if config.needs_latencies and config.allocation.latencies is None:
        raise ConfigError(
            "`allocation` with cost='latency' would measure other latencies when the call is repeated; measure once "
            "with hf_lowrank.measure_latencies(...).save(path) and give `latencies=path`."
        )


def _is_there(target):
    return os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target))


def _taken(target):
    return ConfigError(
        f"`target`={target!r} is there already, and not made by the same call; name another folder, or remove it."
    )


def _check_finished(target, run):
    if read_record(target)["run"] != run:
        raise _taken(target)
    verify_checkpoint(target)
    logger.info("%s is there already, made by the same call; nothing is done.", target)


def _check_data(config, calibration, skeleton):
    """Refuse calibration data that cannot work."""
    if not config.needs_statistics or not skeleton.plan.sites:
        return
    saved = saved_for(config, calibration)
    if saved is None:
        check_calibration(calibration, skeleton.model)
    else:
        saved.check(skeleton.plan.statistics_shapes(config.method.statistics))


def _description(calibration):
    """JSON by which two calls know that they calibrate with the same data."""
    sizes = {f.name: getattr(calibration, f.name) for f in fields(Calibration) if f.name not in ("data", "folder")}
    data = calibration.data
    if isinstance(data, (str, os.PathLike)):
        path = os.fspath(data)
        return {**sizes, "data": sha256_of(path) if os.path.isfile(path) else path}
    if isinstance(data, dict):
        data = [data]
    batches = [value if isinstance(value, dict) else {"text": value} for value in data]
    return {**sizes, "data": digest_of_batches(batches)}


@contextlib.contextmanager
def _alone_in(work):
    """Inside, no other process works in the folder."""
    os.makedirs(work, exist_ok=True)
    lock = FileLock(os.path.join(work, LOCK))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ResourceError(f"Another process is at work in {work}; wait for it, or name another target.") from error
    try:
        yield
    finally:
        lock.release()


def _clear(work):
    """Remove what was made in the work folder, and the folder if it holds nothing else."""
    for name in ("parts", "calibration", "checkpoint"):
        shutil.rmtree(os.path.join(work, name), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(os.path.join(work, LOCK))
        os.rmdir(work)


def _begin(parts, sources):
    """Note what the source is, or refuse one that is not what it was when the work was begun."""
    if parts.facts is None:
        parts.begin({"sources": sources})
    before, work = parts.facts["sources"], os.path.dirname(parts.folder)
    for name in sorted({*before, *sources}):
        if before.get(name) != sources.get(name):
            raise CheckpointError(
                f"{name} of the source is damaged or another file than when this was begun: its sha256 is "
                f"{sources.get(name)}, and was {before.get(name)}. Restore it, or remove {work} to begin anew."
            )


def _gather(origin, config, calibration, work):
    """Collect statistics, or open saved ones."""
    if not config.needs_statistics:
        return
    own = calibration.folder is None
    if own:
        calibration = replace(calibration, folder=os.path.join(work, "calibration"))
    with contextlib.ExitStack() as stack:
        try:
            origin.calibrate(config, calibration, stack)
        except CalibrationError as error:
            # The cure it names is the folder that was chosen here.
            raise CalibrationError(str(error).replace(CURE, ONE_PASS) if own else str(error)) from error
