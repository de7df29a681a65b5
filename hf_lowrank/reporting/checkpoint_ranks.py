"""How low the rank of a checkpoint's matrices is, from its files alone: no model, one tensor at a time."""

import os
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError
from ..linalg import require_finite, singular_energies
from .table import aligned


@dataclass(frozen=True)
class Spectrum:
    """One matrix, or matrices of one shape that are stored as one tensor (experts).

    Args:
        name (`str`): of the tensor.
        type (`str`): the last word of the name that is not `weight`.
        shape (`tuple[int]`): as stored.
        dtype (`str`): as stored.
        bytes (`int`): as stored.
        full_rank (`int`): the smaller side of a matrix.
        numerical_rank (`int`): singular values above the rounding of the dtype, `eps |W|_F`; of several matrices, of
            the one with most.
        energy_rank (`int`): the lowest rank that keeps the energy; of several matrices, of the one that needs most.
    """

    name: str
    type: str
    shape: tuple
    dtype: str
    bytes: int
    full_rank: int
    numerical_rank: int
    energy_rank: int


@dataclass(frozen=True)
class TypeOfMatrix:
    """All matrices whose names end alike.

    Args:
        type (`str`): how.
        tensors (`int`): how many.
        bytes (`int`): of all.
        numerical_share (`float`): mean of numerical rank / full rank.
        energy_share (`float`): mean of energy rank / full rank.
    """

    type: str
    tensors: int
    bytes: int
    numerical_share: float
    energy_share: float


@dataclass(frozen=True)
class Spectra:
    """What `spectra` found; `print` shows two tables.

    Args:
        energy (`float`): the share of the squared weight that `energy_rank` keeps.
        matrices (`list[Spectrum]`): in the order of the files.
        other_bytes (`int`): of all tensors that are not matrices of floating-point numbers.
    """

    energy: float
    matrices: list
    other_bytes: int

    @property
    def types(self):
        """`list[TypeOfMatrix]`, in the order in which they first come."""
        groups = {}
        for matrix in self.matrices:
            groups.setdefault(matrix.type, []).append(matrix)
        return [
            TypeOfMatrix(
                type=name,
                tensors=len(found),
                bytes=sum(m.bytes for m in found),
                numerical_share=sum(m.numerical_rank / m.full_rank for m in found) / len(found),
                energy_share=sum(m.energy_rank / m.full_rank for m in found) / len(found),
            )
            for name, found in groups.items()
        ]

    def to_json(self):
        """Everything as plain JSON."""
        return {**asdict(self), "types": [asdict(entry) for entry in self.types]}

    def __str__(self):
        head = ("tensor", "shape", "dtype", "MiB", "full rank", "numerical rank", f"rank at {self.energy:.0%} energy")
        rows = [
            (
                m.name,
                " x ".join(map(str, m.shape)),
                m.dtype,
                _mib(m.bytes),
                m.full_rank,
                m.numerical_rank,
                m.energy_rank,
            )
            for m in self.matrices
        ]
        kinds = [
            (t.type, t.tensors, _mib(t.bytes), f"{t.numerical_share:.1%}", f"{t.energy_share:.1%}") for t in self.types
        ]
        total = sum(m.bytes for m in self.matrices)
        return "\n".join(
            [
                *aligned([head, *rows]),
                "",
                *aligned([("type", "tensors", "MiB", "numerical rank", f"rank at {self.energy:.0%} energy"), *kinds]),
                f"{len(rows)} matrices, {_mib(total)} MiB; other tensors {_mib(self.other_bytes)} MiB",
            ]
        )


def spectra(folder, energy=0.9):
    r"""Ranks of all matrices in the safetensors files of a folder.

        energy rank = min k : sum_{i <= k} s_i^2 >= energy * sum_i s_i^2

    The singular values are those of the weights themselves. Data-aware methods look at weights in another metric, in
    which ranks are lower: this is a picture, not a plan.

    Args:
        folder (`str`): holds the files.
        energy (`float`, defaults to 0.9): share of the squared weight to keep, in (0, 1].

    Returns:
        [`Spectra`]

    Raises:
        CheckpointError: no file, or one that cannot be read.
        ConfigError: `energy` is not in (0, 1].
        NonFiniteError: a weight holds NaN or infinity; it is named.
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"`energy`={energy!r} must be in (0, 1]; 0.9 is a usual value.")
    names = (
        sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")) if os.path.isdir(folder) else []
    )
    if not names:
        raise CheckpointError(f"There are no safetensors files in {os.fspath(folder)}.")
    matrices, other = [], 0
    for name in names:
        path = os.path.join(folder, name)
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(key)
                    if _is_matrix(key, tensor):
                        matrices.append(_spectrum(key, tensor, energy))
                    else:
                        other += tensor.nbytes
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}. Download or copy the file again.") from error
    return Spectra(energy, matrices, other)


def _is_matrix(key, tensor):
    # Three dimensions under a module's `weight` are a convolution; under a name of their own, stacked matrices.
    stacked = tensor.ndim == 3 and not key.endswith(".weight")
    return tensor.is_floating_point() and tensor.numel() > 0 and (tensor.ndim == 2 or stacked)


def _spectrum(key, tensor, energy):
    require_finite(tensor, key)
    numerical = kept = 0
    # The Gram matrix that singular values come from is no better than the root of float64's precision.
    eps = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    for matrix in tensor.reshape(-1, *tensor.shape[-2:]):
        energies = singular_energies(matrix)
        total = energies.sum()
        numerical = max(numerical, int((energies > eps**2 * total).sum()))
        kept = max(kept, int((energies.cumsum(0) < energy * total).sum()) + 1 if total > 0 else 0)
    words = [word for word in key.split(".") if word != "weight"]
    full = min(tensor.shape[-2:])
    return Spectrum(
        name=key,
        type=words[-1] if words else key,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.nbytes,
        full_rank=full,
        numerical_rank=numerical,
        energy_rank=min(kept, full),
    )


def _mib(size):
    return f"{size / 2**20:.2f}"
