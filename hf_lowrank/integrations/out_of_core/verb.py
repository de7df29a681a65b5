"""The verb: a dense checkpoint in, a factorized one out, and no model in memory."""

import hashlib
import json
import logging
import os
from importlib.metadata import version

from ...errors import ConfigError
from ...files import PARTIAL, enough_space
from ...parts import Parts
from ..calibration import as_calibration
from ..config import LowRankConfig
from ..request import refuse_start
from ..session import Session
from .curves import measure
from .data import check_data, description, gather, repeatable
from .finished import finish, read_checkpoint, read_record, verify_checkpoint
from .recipe_file import write_recipe
from .shards import Shards, split
from .skeleton import Skeleton
from .source import INSTEAD, Source, check_path
from .work import CALIBRATION, CHECKPOINT, PARTS, alone_in, begin, clear


logger = logging.getLogger(__name__)


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
        hub (*optional*): `revision`, `token`, `cache_dir`, `local_files_only`: where `source` is on the Hub.

    Returns:
        [`FactorizedCheckpoint`]: print it, or read its `summary`.

    Raises:
        ConfigError: a configuration that takes the whole model or starts from scratch; a target that is there.
        CheckpointError: a source that is damaged, incomplete, changed since the interrupted call, or of an
            architecture whose weights cannot be read one by one; a damaged part. The message names the file.
        ResourceError: the disk is full; nothing but finished parts stays, and the call can be repeated.
        LowRankError: whatever factorizing may raise.
    """
    config = LowRankConfig() if config is None else config
    if not isinstance(config, LowRankConfig):
        raise ConfigError(f"`config` must be a LowRankConfig, not {type(config).__name__}.")
    config = config.again()
    calibration, config.calibration = repeatable(as_calibration(config.calibration)), None
    config.session = Session()
    _refuse_whole_models(config)
    refuse_start(config.method)
    split({}, max_shard_size)
    check_path("target", target)
    target = os.path.abspath(target)
    there = _is_there(target)
    if there and read_record(target) is None:
        raise _taken(target)
    origin = Source(source, dtype, **hub)
    check_data(config, calibration, Skeleton(origin, config), origin.hub.get("token"))
    identity = {
        "recipe": config.to_json(),
        "calibration": description(calibration) if config.needs_statistics else None,
        "model": [origin.cls.__name__, origin.digest_of_config],
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "max_shard_size": max_shard_size,
        "versions": {name: version(name) for name in ("hf-lowrank", "torch", "transformers")},
    }
    sources = origin.digests()
    run = hashlib.sha256(json.dumps([identity, sources], sort_keys=True).encode()).hexdigest()
    work = f"{target}{PARTIAL}"
    if there:
        _check_finished(target, run)
    else:
        with alone_in(work), enough_space(target, f"free some space and run again; {work} keeps what is finished"):
            folder = os.path.join(work, CHECKPOINT)
            os.makedirs(folder, exist_ok=True)
            parts = Parts(os.path.join(work, PARTS), identity, independent=True)
            begin(parts, sources)
            gather(origin, config, calibration, os.path.join(work, CALIBRATION))
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
    clear(work)
    return read_checkpoint(target)


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
    if config.inner is not None:
        raise ConfigError(f"`inner` quantizes the factors, which takes a loaded model; leave it out, or {INSTEAD}.")
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
