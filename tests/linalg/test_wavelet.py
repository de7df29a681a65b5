"""The transform is orthogonal at every length, and is PyWavelets' own where that is defined."""

import sys

import pytest
import pywt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowrank.errors import ConfigError, MissingPackageError
from hf_lowrank.linalg.wavelet import band_names, band_sizes, orthogonal_wavelets, synthesize, wavelet_filters


def transform(size, levels, wavelet="haar"):
    """The matrix T: rows are what single coefficients stand for."""
    bands = [torch.eye(n, dtype=torch.float64) for n in band_sizes(size, levels).values()]
    return synthesize(bands, wavelet_filters(wavelet), size)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "coif1", "db10"])
@pytest.mark.parametrize(("size", "levels"), [(2, 1), (3, 1), (3, 2), (16, 1), (17, 1), (48, 3), (57, 4)])
def test_orthogonal_at_every_length(wavelet, size, levels):
    matrix = transform(size, levels, wavelet)
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "sym4", "coif2"])
@pytest.mark.parametrize("levels", [1, 3])
def test_equal_to_pywavelets(wavelet, levels):
    size = 64
    identity = torch.eye(size, dtype=torch.float64).numpy()
    theirs = pywt.wavedec(identity, wavelet, "periodization", levels, axis=0)
    theirs = torch.cat([torch.from_numpy(band) for band in theirs])
    torch.testing.assert_close(transform(size, levels, wavelet), theirs, rtol=0, atol=1e-11)


def test_haar_is_sums_and_differences():
    x = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]], dtype=torch.float64)
    low, high = x @ transform(5, 1)[:3].T, x @ transform(5, 1)[3:].T
    root = 0.5**0.5
    torch.testing.assert_close(low, torch.tensor([[3 * root, 8 * root, 7.0]], dtype=torch.float64))
    torch.testing.assert_close(high, torch.tensor([[-root, -2 * root]], dtype=torch.float64))


def test_names_and_sizes():
    assert band_names(2) == ["L", "H2", "H1"]
    assert band_sizes(11, 2) == {"L": 3, "H2": 3, "H1": 5}
    with pytest.raises(ConfigError, match="`levels`=3 is too many for a side of 4: .* use at most 2"):
        band_sizes(4, 3)
    assert band_sizes(5, 3) == {"L": 1, "H3": 1, "H2": 1, "H1": 2}
    with pytest.raises(ConfigError, match="use at most 0"):
        band_sizes(1, 1)


def test_gradients_and_empty_bands():
    bands = [torch.randn(rows, n, dtype=torch.float64) for rows, n in zip((2, 0, 1), (4, 4, 7), strict=True)]
    for band in bands:
        band.requires_grad_()
    assert torch.autograd.gradcheck(lambda *some: synthesize(list(some), wavelet_filters("db2"), 15), bands)
    with torch.inference_mode():
        synthesize([torch.ones(1, 6), torch.ones(1, 6)], wavelet_filters("sym2"), 12)
    bands = [torch.ones(1, 6, requires_grad=True), torch.ones(1, 6)]
    synthesize(bands, wavelet_filters("sym2"), 12).sum().backward()


def test_tracing_leaves_no_fake_constants_behind():
    filters = wavelet_filters("db4")
    with FakeTensorMode():
        synthesize([torch.ones(1, 9), torch.ones(1, 9)], filters, 18)
    assert type(synthesize([torch.ones(1, 9), torch.ones(1, 9)], filters, 18)) is torch.Tensor


def test_wavelets_that_are_not_orthogonal_are_refused():
    assert {"haar", "db2", "sym8", "coif3"} <= set(orthogonal_wavelets())
    for name in ("bior2.2", "dmey", "wavelet", None):
        with pytest.raises(ConfigError, match=r"`wavelet`=.* is not an orthogonal wavelet .* \['coif1', "):
            wavelet_filters(name)


def test_without_pywavelets(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    for cached in (orthogonal_wavelets, wavelet_filters):
        cached.cache_clear()
    with pytest.raises(MissingPackageError, match=r'needs PyWavelets, .* `pip install "hf-lowrank\[peft\]"`'):
        wavelet_filters("haar")
