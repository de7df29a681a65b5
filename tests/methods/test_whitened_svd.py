import pytest
import torch

from hf_lowrank import METHODS, ConfigError
from hf_lowrank.testing import make_gram, make_weight


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_both_forms_reach_the_same_optimum(shape):
    weight, stats = make_weight(*shape), {"input_gram": make_gram(shape[1])}
    auto = METHODS["whitened_svd"]().factorize(weight, 7, stats)
    cholesky = METHODS["whitened_svd"](form="cholesky").factorize(weight, 7, stats)
    torch.testing.assert_close(auto.left @ auto.right, cholesky.left @ cholesky.right, rtol=1e-5, atol=1e-8)
    assert abs(auto.relative_error - cholesky.relative_error) < 1e-6


def test_full_shrinkage_approaches_plain_svd():
    weight, stats = make_weight(20, 30), {"input_gram": make_gram(30)}
    shrunk = METHODS["whitened_svd"](shrinkage=1 - 1e-9).factorize(weight, 7, stats)
    plain = METHODS["svd"]().factorize(weight, 7, {})
    torch.testing.assert_close(shrunk.left @ shrunk.right, plain.left @ plain.right, rtol=1e-4, atol=1e-6)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="`form`='qr' of whitened_svd must be one of"):
        METHODS["whitened_svd"](form="qr")
    with pytest.raises(ConfigError, match=r"`shrinkage`=1 of whitened_svd must be a number in \[0, 1\)"):
        METHODS["whitened_svd"](shrinkage=1)
