"""The finished checkpoint: what makes the files one, and what is said of them."""

import json
import os
import shutil
from dataclasses import asdict, dataclass

from ...errors import CheckpointError
from ...files import sha256_of, write_json
from ...reporting import Summary, summary
from ..config import QUANT_METHOD
from .source import files_beside, load_model


RECORD = "factorization.json"
VERSION = 1
# Where `from_pretrained` looks by default; transformers' helper wants to be told all of it.
PLACES = {
    "cache_dir": None,
    "force_download": False,
    "proxies": None,
    "local_files_only": False,
    "token": None,
    "revision": "main",
    "subfolder": "",
    "trust_remote_code": False,
}


@dataclass(frozen=True)
class FactorizedCheckpoint:
    """A checkpoint in a folder; `print` shows its layers and its size.

    Args:
        folder (`str`): where it is.
        summary ([`Summary`]): its factorized layers, and totals.
        recipe (`dict`): how it was made, as in its config.json; empty if nothing is factorized.
        record (`dict`): `sources` and `files` with their sha256; empty if it was not made by `factorize_checkpoint`.
    """

    folder: str
    summary: Summary
    recipe: dict
    record: dict

    def to_json(self):
        """Everything as plain JSON."""
        return {**asdict(self), "line": self.summary.line}

    def __str__(self):
        return f"{self.summary}\n{self.folder}"


def finish(skeleton, shards, folder, record):
    """Write all that is not weights; the record of everything comes last.

    Args:
        skeleton ([`Skeleton`]): all of whose tensors are written.
        shards ([`Shards`]): the weight files.
        folder (`str`): where they are.
        record (`dict`): JSON to be recorded beside the sha256 of the files.
    """
    model, source = skeleton.finish(), skeleton.source
    shards.write_index(model.num_parameters())
    if hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(None, False, None, source.name, **{**PLACES, **source.hub})
    # As in `save_pretrained`.
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for path in files_beside(source.name, **source.hub):
        shutil.copyfile(path, os.path.join(folder, os.path.basename(path)))
    files = {name: sha256_of(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if name != RECORD}
    write_json(os.path.join(folder, RECORD), {"version": VERSION, **record, "files": files})


def read_record(folder):
    """What [`factorize_checkpoint`] has recorded in `folder`; `None` if it was not at work there.

    Raises:
        CheckpointError: the record cannot be read.
    """
    path = os.path.join(folder, RECORD)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if record["version"] == VERSION and isinstance(record["files"], dict):
            return record
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"Cannot read {path}: {error!r}; remove it if the checkpoint is to be kept.") from error
    raise CheckpointError(f"{path} is of version {record['version']!r}, this hf_lowrank reads version {VERSION}.")


def verify_checkpoint(folder):
    """Read every file that is recorded in `folder`, and compare its sha256.

    Raises:
        CheckpointError: a file that is missing or is not as it was written, with its name.
    """
    for name, digest in (read_record(folder) or {"files": {}})["files"].items():
        path = os.path.join(folder, name)
        found = sha256_of(path) if os.path.isfile(path) else None
        if found != digest:
            raise CheckpointError(
                f"{path} {'is missing' if found is None else 'has another sha256 than it was written with'}; make or "
                "download the checkpoint again."
            )


def is_factorized(folder):
    """Whether the config.json in a folder is that of a factorized checkpoint."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            described = json.load(file).get("quantization_config") or {}
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"Cannot read {path}: {error!r}; download or save it again.") from error
    return described.get("quant_method") == QUANT_METHOD


def read_checkpoint(folder):
    """The [`FactorizedCheckpoint`] in `folder`, dense or factorized, from its config and the headers of its files.

    Raises:
        CheckpointError: it is incomplete.
    """
    model = load_model(folder, device_map="meta")
    config = getattr(model.config, "quantization_config", None)
    return FactorizedCheckpoint(
        folder, summary(model), getattr(config, "recipe", None) or {}, read_record(folder) or {}
    )
