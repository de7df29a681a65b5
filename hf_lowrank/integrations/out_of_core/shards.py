"""The weight files of the new checkpoint, one after the other; each is read back before the next is begun."""

import os
import shutil

from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ...errors import CheckpointError, ConfigError, ResourceError
from ...files import sha256_of, write_json, write_tensors
from .skeleton import described


def split(layout, max_shard_size):
    """Which tensors go into which file, as `save_pretrained` decides it.

    Raises:
        ConfigError: `max_shard_size` is not a size.
    """
    try:
        return split_torch_state_dict_into_shards(
            layout, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"`max_shard_size`={max_shard_size!r} must be a number of bytes, or text such as '5GB'."
        ) from error


class Shards:
    """Weight files that are written from a skeleton.

    The factors of a weight are a part by themselves until the file that holds them is there, so that an interruption
    costs one weight, and the disk holds the factors of one file twice, not of all.

    Args:
        skeleton ([`Skeleton`]): makes the tensors.
        parts ([`Parts`]): what is finished.
        folder (`str`): of the files.
        max_shard_size (`str` or `int`): bytes of a file at most.
    """

    def __init__(self, skeleton, parts, folder, max_shard_size):
        self._skeleton = skeleton
        self._parts = parts
        self._folder = folder
        self._split = split(skeleton.layout, max_shard_size)
        self._unit = {name: unit for unit in skeleton.units for name in unit.saved}
        # The unit read last, and its tensors: most are asked for one after the other.
        self._last = None, {}

    def check_space(self):
        """Raise [`ResourceError`] if the disk is too small for what is yet to be written."""
        sizes = [
            sum(self._skeleton.layout[name].nbytes for name in names)
            for names in self._split.filename_to_tensors.values()
        ]
        there = self._parts.size() + sum(entry.stat().st_size for entry in os.scandir(self._folder))
        needed, free = sum(sizes) + max(sizes) - there, shutil.disk_usage(self._folder).free
        if needed > free:
            raise ResourceError(
                f"The factorized checkpoint takes {needed / 2**30:.2f} GiB more while it is written, and "
                f"{free / 2**30:.2f} GiB are free beside {self._folder}; free some space, choose a target on another "
                "disk, or lower `max_shard_size`, since one file is held twice."
            )

    def write(self):
        """Write all files, and the index where there are several."""
        files = self._split.filename_to_tensors
        rest = {name for names in files.values() for name in names}
        for file, names in files.items():
            self._write(file, names)
            rest -= set(names)
            for unit in self._units(names):
                if rest.isdisjoint(unit.saved):
                    self._parts.remove(_part(unit))

    def write_index(self, parameters):
        """Write the index of the files, where there are several.

        Args:
            parameters (`int`): how many numbers the model has.
        """
        if self._split.is_sharded:
            metadata = {"total_parameters": parameters, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": dict(sorted(self._split.tensor_to_filename.items()))}
            write_json(os.path.join(self._folder, SAFE_WEIGHTS_INDEX_NAME), index)

    def _write(self, file, names):
        path, part = os.path.join(self._folder, file), f"shard.{file}"
        if part in self._parts and os.path.exists(path):
            _, note = self._parts.read(part)
            if sha256_of(path) != note["sha256"]:
                raise CheckpointError(
                    f"{path} is damaged, its sha256 is not that of what was written; remove it and run again, which "
                    "makes it anew."
                )
            self._skeleton.restore(note["errors"])
            return
        errors = {}
        for unit in self._units(names):
            if unit.sites:
                errors.update(self._factorize(unit))
        layout = {name: described(self._skeleton.layout[name]) for name in names}
        digest = write_tensors(path, layout, self._read, {"format": "pt"})
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path} does not read back as it was written; the disk may be failing.")
        self._parts.write(part, {}, {"sha256": digest, "errors": errors})

    def _units(self, names):
        return list({self._unit[name].name: self._unit[name] for name in names}.values())

    def _factorize(self, unit):
        """Make sure that the factors of a unit are a part; returns their errors."""
        if _part(unit) in self._parts:
            tensors, errors = self._parts.read(_part(unit))
            self._skeleton.restore(errors)
        else:
            tensors, errors = self._skeleton.make(unit)
            self._parts.write(_part(unit), tensors, errors)
        return errors

    def _read(self, name):
        unit = self._unit[name]
        if self._last[0] is not unit:
            self._last = None, {}
            tensors = self._parts.read(_part(unit))[0] if unit.sites else self._skeleton.make(unit)[0]
            self._last = unit, tensors
        return self._last[1][name]


def _part(unit):
    return f"factors.{unit.name}"
