import pytest
import torch

from hf_lowrank import NonFiniteError, NotPSDError, NumericalWarning
from hf_lowrank.linalg import psd_safe_cholesky, psd_sqrt, shrink
from hf_lowrank.testing import make_gram


@pytest.mark.parametrize("tokens", [5, 20, 80])
def test_square_root_of_any_psd_matrix(tokens):
    gram = make_gram(20, tokens=tokens)
    root = psd_sqrt(gram)
    torch.testing.assert_close(root @ root.T, gram, rtol=1e-10, atol=1e-12)


def test_cholesky_is_exact_where_it_can_be(recwarn):
    gram = make_gram(20)
    lower = psd_safe_cholesky(gram)
    torch.testing.assert_close(lower @ lower.T, gram)
    assert not recwarn.list


def test_cholesky_of_a_singular_matrix_warns_and_says_how_much():
    with pytest.warns(NumericalWarning, match="added 1e-"):
        lower = psd_safe_cholesky(make_gram(20, tokens=5))
    assert torch.isfinite(lower).all()


def test_cholesky_gives_up_loudly():
    with pytest.raises(NotPSDError, match="jitter up to 0.0001"):
        psd_safe_cholesky(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    with pytest.raises(NonFiniteError):
        psd_safe_cholesky(torch.full((2, 2), float("nan")))


def test_shrinkage_keeps_the_trace():
    gram = make_gram(20)
    torch.testing.assert_close(shrink(gram, 0.3).trace(), gram.trace())
    assert shrink(gram, 0.0) is gram
    diagonal = gram.trace() / 20 * torch.eye(20, dtype=gram.dtype)
    torch.testing.assert_close(shrink(gram, 1.0), diagonal)


def test_shrinkage_to_the_diagonal_keeps_it_and_leaves_nothing_singular():
    gram = make_gram(12, tokens=4)
    shrunk = shrink(gram, 0.3, "diagonal")
    torch.testing.assert_close(shrunk.diagonal(), gram.diagonal())
    torch.testing.assert_close(shrunk - shrunk.diagonal().diag(), 0.7 * (gram - gram.diagonal().diag()))
    assert torch.linalg.eigvalsh(shrunk)[0] > 0
    gram[3] = gram[:, 3] = 0
    assert torch.linalg.eigvalsh(shrink(gram, 0.3, "diagonal"))[0] > 0
