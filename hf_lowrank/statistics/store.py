"""Statistics in memory or in one safetensors file: what a calibration pass leaves behind."""

import json
import os

import torch
from safetensors import SafetensorError, safe_open

from ..errors import StatisticsError
from ..files import write_tensors
from .base import STATISTICS
from .push import push_statistics


FORMAT = "hf_lowrank.statistics"
VERSION = 1


class Statistics:
    """Finished statistics of a model, read one tensor at a time.

    Args:
        leaders (`dict[str, str]`): for each module, the module under whose name its statistics are kept; modules that
            read the same input share one.
        tensors (`dict[str, dict[str, torch.Tensor]]`): `{leader: {statistic: tensor}}`.
        provenance (`dict`): JSON: what was collected from, how many tokens.
    """

    def __init__(self, leaders, tensors, provenance):
        self.leaders = leaders
        self.provenance = provenance
        self._tensors = tensors
        self._shapes = {(owner, name): t.shape for owner, found in tensors.items() for name, t in found.items()}

    def __contains__(self, module):
        return module in self.leaders

    def get(self, module, names):
        """`{statistic: tensor}` of `module` for the statistics in `names`."""
        if module not in self.leaders:
            raise StatisticsError(f"No statistics for {module}; they cover {_some(self.leaders)}.")
        owners = {name: self._owner(module, name) for name in names}
        missing = sorted(name for name, owner in owners.items() if owner is None)
        if missing:
            raise StatisticsError(
                f"The statistics hold no {missing} for {module}; collect them again with the method that needs them."
            )
        return {name: self._read(owner, name) for name, owner in owners.items()}

    def joint(self, modules, names):
        """`{statistic: tensor}` of a group of modules, joined by [`Statistic.join`]; of one module as in `get`."""
        if len(modules) == 1:
            return self.get(modules[0], names)
        for module in modules:
            # Raises for a module without statistics.
            self.get(module, ())
        joined = {}
        for name in names:
            # Members with one input count it once.
            distinct = {self._owner(module, name): module for module in modules}
            joined[name] = STATISTICS[name].join([self.get(module, [name])[name] for module in distinct.values()])
        return joined

    def check(self, shapes):
        """Raise [`StatisticsError`] unless every `{module: {statistic: shape}}` of `shapes` is covered and fits."""
        missing = [module for module in shapes if module not in self.leaders]
        if missing:
            raise StatisticsError(
                f"The statistics are of another model: they miss {len(missing)} of {len(shapes)} modules, such as "
                f"{missing[0]}; they cover {_some(self.leaders)}. Collect them with the model they are meant for."
            )
        for module, wanted in shapes.items():
            for name, shape in wanted.items():
                owner = self._owner(module, name)
                found = None if owner is None else tuple(self._shapes[owner, name])
                if found != tuple(shape):
                    raise StatisticsError(
                        f"The statistics are of another model or another method: `{name}` of {module} has shape "
                        f"{found}, but {tuple(shape)} is needed."
                    )

    def _owner(self, module, name):
        # Statistics of inputs stand under the module that leads those with the same input.
        return next((owner for owner in (module, self.leaders[module]) if (owner, name) in self._shapes), None)

    def save(self, path):
        """Write everything to one safetensors file; the file appears only when it is complete."""
        header = {"format": FORMAT, "version": VERSION, "leaders": self.leaders, "provenance": self.provenance}
        layout = {f"{owner}:{name}": (torch.float64, tuple(shape)) for (owner, name), shape in self._shapes.items()}
        write_tensors(
            path, layout, lambda key: self._read(*key.rsplit(":", 1)).double(), {"hf_lowrank": json.dumps(header)}
        )

    def push_to_hub(
        self,
        repo_id,
        path_in_repo="statistics.safetensors",
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        commit_message="Upload calibration statistics",
    ):
        """Put the file into a repository on the Hub, with a card: one commit, or none.

        `calibration="owner/repository/statistics.safetensors"` reads it from there.

        Args:
            repo_id (`str`): created if it is not there.
            path_in_repo (`str`, defaults to `"statistics.safetensors"`): one repository can hold many.
            private (`bool`, *optional*): of a repository that is created.
            token (`str` or `bool`, *optional*): as in `huggingface_hub`.
            revision (`str`, *optional*): a branch, made if it is not there.
            create_pr (`bool`, defaults to `False`): open a pull request instead.
            commit_message (`str`, *optional*): its summary.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return push_statistics(self, repo_id, path_in_repo, private, token, revision, create_pr, commit_message)

    @staticmethod
    def load(path):
        """Open a file written by [`Statistics.save`]; tensors are read when asked for."""
        return StatisticsFile(path)

    def _read(self, owner, name):
        return self._tensors[owner][name]


class StatisticsFile(Statistics):
    """Statistics that stay on disk; holds a path, so it can be copied and pickled freely."""

    def __init__(self, path):
        self.path = os.fspath(path)
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("hf_lowrank", "{}"))
                shapes = {tuple(key.rsplit(":", 1)): file.get_slice(key).get_shape() for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"Cannot read statistics from {self.path}: {error}") from error
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise StatisticsError(
                f"{self.path} is not a statistics file of version {VERSION} (it says {header.get('format')!r}, "
                f"version {header.get('version')!r}); write one with hf_lowrank.collect_statistics(...).save(path)."
            )
        super().__init__(header["leaders"], {}, header["provenance"])
        self._shapes = shapes

    def _read(self, owner, name):
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(f"{owner}:{name}")


class StatisticsFiles(Statistics):
    """Statistics in several files, one of them open at a time; holds paths, so it can be copied and pickled freely.

    Args:
        paths (`list[str]`): files written by [`Statistics.save`], each of other modules.
        provenance (`dict`): JSON: what was collected from; the number of tokens is that of the files.
    """

    def __init__(self, paths, provenance):
        files = [StatisticsFile(path) for path in paths]
        leaders = {module: leader for file in files for module, leader in file.leaders.items()}
        super().__init__(leaders, {}, {**provenance, "tokens": files[0].provenance["tokens"]})
        self._shapes = {key: shape for file in files for key, shape in file._shapes.items()}
        self._files = {key: file for file in files for key in file._shapes}

    def _read(self, owner, name):
        return self._files[owner, name]._read(owner, name)


def check_finite(owner, name, tensor):
    """Raise if calibration produced NaN or infinity at `owner`."""
    # A sum is finite only if all terms are, and sums of squares are far from overflowing in float64.
    if not torch.isfinite(tensor.sum()):
        raise StatisticsError(
            f"The calibration inputs or gradients of {owner} hold NaN or infinite values (seen in `{name}`); the "
            "model overflows there. Load it in float32 or bfloat16 for calibration, or check its weights and the data."
        )


def _some(names):
    names = sorted(names)
    return f"{len(names)} modules, such as {names[0]}" if names else "no modules"
