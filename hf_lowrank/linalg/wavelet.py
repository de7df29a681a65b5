"""The orthonormal discrete wavelet transform of vectors of any length, as the synthesis of their bands.

A level halves a vector of even length n into n/2 low and n/2 high coefficients, with periodic boundaries, as
PyWavelets does in its mode "periodization". The last entry of an odd vector goes to its low half as it is, so that
the transform is square and orthogonal at every length. After all levels the bands are, coarsest first,
`["L", "H2", "H1"]` for two levels: level 1 is the finest.
"""

import functools

import torch

from ..errors import ConfigError, MissingPackageError


# How far the filters of a wavelet may be from orthonormal; tabulated coefficients have 11 digits or more.
ORTHONORMAL = 1e-10


def band_names(levels):
    """Names of the bands, in the order in which everything here takes and gives them."""
    return ["L", *(f"H{level}" for level in range(levels, 0, -1))]


def band_sizes(size, levels):
    """Coefficients in each band of a vector of length `size`.

    Raises:
        ConfigError: a level would have fewer than two entries to split.
    """
    lengths = _lengths(size, levels)
    if lengths[-2] < 2:
        raise ConfigError(
            f"`levels`={levels} is too many for a side of {size}: a level splits at least two entries; use at most "
            f"{max(size - 1, 0).bit_length()} here, or leave this weight out."
        )
    return {"L": lengths[-1], **{f"H{level}": lengths[level - 1] // 2 for level in range(levels, 0, -1)}}


def synthesize(bands, filters, size):
    r"""Rows of coefficients, each row of one band alone, as the vectors they stand for.

        out = cat(c_b T_b for b in bands),    T = [T_L; T_Hk; ...; T_H1],    T T^T = I

    Costs a few multiplications per number of the result and a constant number of operations per level.

    Args:
        bands (`list[Tensor]`): coefficients `(rows_b, size of b)` in the order of `band_names`; rows may be 0.
        filters (`tuple`): `(low, high)`, the taps that `wavelet_filters` gives.
        size (`int`): length of the vectors.

    Shapes:
        returns `(sum of rows_b, size)`, the rows of the first band first.
    """
    low, high = filters
    lengths = _lengths(size, len(bands) - 1)
    vectors = bands[0]
    for length, details in zip(lengths[-2::-1], bands[1:], strict=True):
        half = length // 2
        coarse, fine = _upsample(vectors[:, :half], low), _upsample(details, high)
        if length % 2:
            coarse = torch.cat([coarse, vectors[:, half:]], 1)
            fine = torch.nn.functional.pad(fine, (0, 1))
        vectors = torch.cat([coarse, fine])
    return vectors


@functools.cache
def orthogonal_wavelets():
    """Names of the wavelets of PyWavelets that give an orthogonal transform.

    Raises:
        MissingPackageError: PyWavelets is not installed.
    """
    pywt = _pywt()
    return [name for name in pywt.wavelist(kind="discrete") if _is_orthonormal(pywt.Wavelet(name))]


@functools.cache
def wavelet_filters(wavelet):
    """The reconstruction filters `(low, high)` of a wavelet, tuples of an even number of taps.

    Raises:
        ConfigError: the name is unknown, or the wavelet is not orthogonal.
        MissingPackageError: PyWavelets is not installed.
    """
    if wavelet not in orthogonal_wavelets():
        raise ConfigError(
            f"`wavelet`={wavelet!r} is not an orthogonal wavelet of PyWavelets; choose one of {orthogonal_wavelets()}."
        )
    described = _pywt().Wavelet(wavelet)
    return tuple(described.rec_lo), tuple(described.rec_hi)


def _lengths(size, levels):
    """What is left to split before level 1, 2, ..., and at last the size of the lowest band."""
    lengths = [size]
    for _ in range(levels):
        lengths.append((lengths[-1] + 1) // 2)
    return lengths


def _upsample(x, taps):
    """Every row of `x`, `(rows, n)`, as coefficients of one filter: `(rows, 2 n)`.

    y[i] = sum_k x[k] taps[i - 2 k + centre],    centre = taps / 2 - 1,    indices modulo the lengths
    """
    rows, size = x.shape
    # A constant that is made while the call is traced belongs to the trace, and must not be kept.
    traced = torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)
    first, kernel = (_kernel.__wrapped__ if traced else _kernel)(taps, size, x.dtype, x.device)
    width = len(kernel)
    if width == 1:
        return (x[:, :, None] * kernel[0]).reshape(rows, 2 * size)
    x = torch.cat([x[:, size + first :], x, x[:, : first + width - 1]], 1)
    # One product of two matrices; a batch of tiny ones is several times slower.
    return (x.unfold(1, width, 1).reshape(-1, width) @ kernel).reshape(rows, 2 * size)


@functools.lru_cache(maxsize=256)
def _kernel(taps, size, dtype, device):
    """`(first, kernel)`: `y[2 j + p] = sum_e x[j + first + e] kernel[e, p]`."""
    centre = len(taps) // 2 - 1
    # Even and odd entries, p, meet every second tap: (neighbour of j, p, tap).
    met = [((p + centre - q) // 2, p, taps[q]) for p in (0, 1) for q in range((p + centre) % 2, len(taps), 2)]
    first, last = min(met)[0], max(met)[0]
    # A filter longer than the vector goes round it: what meets the same entry adds up.
    kernel = [[0.0, 0.0] for _ in range(min(last - first + 1, size))]
    for neighbour, p, tap in met:
        kernel[(neighbour - first) % size][p] += tap
    # A tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        return -(-first % size), torch.tensor(kernel, dtype=dtype, device=device)


def _is_orthonormal(wavelet):
    # PyWavelets marks "dmey" as orthogonal, whose filters are so to three digits only.
    if not wavelet.orthogonal:
        return False
    low, high = (torch.tensor(taps, dtype=torch.float64) for taps in (wavelet.rec_lo, wavelet.rec_hi))
    length = len(low)
    error = 0.0
    for shift in range(0, length, 2):
        for first, second in ((low, low), (high, high), (low, high), (high, low)):
            expected = float(first is second and shift == 0)
            error = max(error, abs(float(first[: length - shift] @ second[shift:]) - expected))
    return error < ORTHONORMAL


def _pywt():
    try:
        import pywt
    except ImportError as error:
        raise MissingPackageError(
            '`wavelet` needs PyWavelets, which is not installed: `pip install "hf-lowrank[peft]"`.'
        ) from error
    return pywt
