"""Finished parts of a long computation, kept in a folder so that it can be interrupted and go on."""

import contextlib
import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .files import PARTIAL, raw, write_json, write_tensors


MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
VERSION = 2
# Entries of a config that say where a model came from, not what it computes; dtypes are those of the weights.
RECORDS = {"_name_or_path", "architectures", "dtype", "transformers_version"}


class Parts:
    """A folder of files, each of which appears only when it is complete.

    Args:
        folder (`str`): where; made if it does not exist.
        identity (`dict[str, str]`): everything that decides what the parts hold; parts of another identity are
            refused.
        independent (`bool`, defaults to `False`): whether each part can be made again by itself, so that one that is
            damaged may be removed.

    Attributes:
        facts (`dict`, *optional*): JSON given to `begin`, by this run or the one it continues.

    Raises:
        CheckpointError: the folder holds parts of another run.
    """

    def __init__(self, folder, identity, independent=False):
        self.folder = os.fspath(folder)
        self._independent = independent
        self.facts = None
        self._identity = {"version": VERSION, **identity}
        os.makedirs(self.folder, exist_ok=True)
        if os.path.exists(self._manifest):
            self._continue()
        # What a run that was killed had begun to write.
        for name in os.listdir(self.folder):
            if name.endswith(PARTIAL):
                os.remove(os.path.join(self.folder, name))

    @property
    def _manifest(self):
        return os.path.join(self.folder, MANIFEST)

    def _continue(self):
        try:
            with open(self._manifest, encoding="utf-8") as file:
                manifest = json.load(file)
            found, self.facts = manifest["identity"], manifest["facts"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"Cannot read {self._manifest}: {error!r}; {self._cure}.") from error
        different = sorted(key for key in {*found, *self._identity} if found.get(key) != self._identity.get(key))
        if different:
            raise CheckpointError(
                f"{self.folder} holds parts of another run, which differs in {different}; repeat that run to go on "
                f"with it, or {self._cure}."
            )

    @property
    def _cure(self):
        return f"give an empty `folder`, or remove {self.folder}"

    @property
    def _cure_of_part(self):
        return "remove it to have it made again" if self._independent else self._cure

    def begin(self, facts):
        """Write the manifest, before any part: the identity, and `facts` that a later run need not find again."""
        write_json(self._manifest, {"identity": self._identity, "facts": facts})
        self.facts = facts

    def path(self, name):
        """The file that holds the part `name`."""
        return os.path.join(self.folder, f"{name}{SUFFIX}")

    def names(self):
        """The names of all parts that are there, sorted."""
        files = sorted(entry.name for entry in os.scandir(self.folder))
        return [name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)]

    def __contains__(self, name):
        return os.path.exists(self.path(name))

    def write(self, name, tensors, note=None):
        """Write a part: `tensors` by name, and JSON."""
        layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        note = json.dumps(note)
        metadata = {"note": note, "sha256": _digest_of_part(tensors, note)}
        write_tensors(self.path(name), layout, tensors.__getitem__, metadata)

    def read(self, name):
        """`(tensors, note)` of a part, on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or does not hold what was written.
        """
        try:
            with safe_open(self.path(name), "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                note, digest = file.metadata()["note"], file.metadata()["sha256"]
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise CheckpointError(f"Cannot read {self.path(name)}: {error}; {self._cure_of_part}.") from error
        if digest != _digest_of_part(tensors, note):
            raise CheckpointError(f"{self.path(name)} is damaged, its sha256 is another; {self._cure_of_part}.")
        return tensors, json.loads(note)

    def remove(self, name):
        """Remove a part, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path(name))

    def size(self):
        """Bytes of all parts."""
        return sum(entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file())


def _digest_of_part(tensors, note):
    digest = hashlib.sha256(note.encode())
    for key in sorted(tensors):
        _add(digest, key, tensors[key])
    return digest.hexdigest()


def digest_of_batches(batches):
    """A sha256 of the tensors, and of plain values, in a list of batches."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(b"batch")
        for key in sorted(batch):
            _add(digest, key, batch[key])
    return digest.hexdigest()


def digest_of_model(model):
    """A sha256 of everything a checkpoint of `model` would hold, wherever it was loaded from and is placed.

    What accelerate keeps on disk is fetched module by module.
    """
    digest = hashlib.sha256()
    if hasattr(model, "config"):
        config = without_records(model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, module in model.named_modules():
            with _fetched(module):
                # Other buffers follow from the config, or change while the model runs.
                members = {**module._parameters, **module._buffers}
                for key in sorted(set(members) - module._non_persistent_buffers_set):
                    _add(digest, f"{name}.{key}", members[key])
    return digest.hexdigest()


def without_records(config):
    """A config without its records, nor those of the configs inside."""
    if not isinstance(config, dict):
        return config
    return {key: without_records(value) for key, value in config.items() if key not in RECORDS}


def _fetched(module):
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _add(digest, key, value):
    if isinstance(value, torch.Tensor):
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(raw(value))
    else:
        digest.update(json.dumps([key, value], sort_keys=True, default=lambda other: type(other).__name__).encode())
