"""What every method promises."""

import torch

from ..linalg import truncated_svd
from ..statistics import STATISTICS
from .matrices import DEGENERACIES, make_gram, make_inputs, make_weight


# float64 throughout; the slack covers the square root of rounding in squared errors.
RTOL, ATOL = 1e-6, 1e-9
SHAPES = ((24, 40), (40, 24), (32, 32))


class OnlyDeclared(dict):
    """Statistics that refuse to be asked for anything else."""

    def __missing__(self, key):
        raise AssertionError(f"the method reads {key!r}, which it does not declare in `statistics`")


def make_statistics(method, rows, columns, tokens=None):
    """Random statistics of the kinds `method` declares.

    With `tokens`, those of so few inputs, of which the later half of the channels is zero and of no matter to the
    loss.
    """
    inputs = make_inputs(columns, tokens) + torch.linspace(-1, 1, columns, dtype=torch.float64)
    gradients = make_inputs(columns, tokens, seed=2)
    if tokens is not None:
        inputs[:, columns // 2 :] = gradients[:, columns // 2 :] = 0
    makers = {
        "input_gram": lambda: make_gram(columns, tokens),
        "gradient_gram": lambda: make_gram(rows, tokens, seed=2),
        "input_norm": lambda: torch.stack([inputs.abs().mean(0), inputs.square().mean(0).sqrt()]),
        "input_mean": lambda: inputs.mean(0),
        "input_covariance": lambda: inputs.T.cov(),
        "fisher_columns": lambda: gradients.square().sum(0),
        "fisher_rows": lambda: make_inputs(rows, tokens, seed=2).square().sum(0),
        "importance_columns": lambda: gradients.clamp(min=0).sum(0),
        "importance_rows": lambda: make_inputs(rows, tokens, seed=2).clamp(min=0).sum(0),
    }
    unknown = set(method.statistics) - set(makers)
    assert not unknown, f"hf_lowrank.testing cannot make {unknown}; extend make_statistics"
    assert all(name in STATISTICS for name in method.statistics)
    return OnlyDeclared({name: makers[name]() for name in method.statistics})


def check_method(method):
    """Assert the laws of methods on `method`, an instance.

    Exact at full rank; the error falls with the rank and equals `error_curve`; no worse than plain SVD in its own
    objective; a shift of the bias comes where it was announced, and is zero at full rank; same input, same bits; the
    weight is left alone; degenerate weights, singular statistics and those of inputs that were never seen give finite
    factors, and the error that is reported is the one there is; float32 and bfloat16 weights are accepted; the
    documentation names a reference. Of a method that is `nested`, factors at a rank are the leading parts of those at
    full rank, and `loss_curve` is the first-order change of the loss.

    Of a method that is not as good as an SVD of its rank (`bound`), full rank need not be exact, and plain SVD is that
    of the rank it says; one that is not `thin` is not compared with it. One that `searches` has to improve with twice
    the rank only. One that `initialises` is asked for nothing of this but a start that its seed alone decides.
    """
    assert "Reference:" in type(method).__doc__, "say where the method comes from"
    if method.initialises:
        _check_start(method)
        return
    for rows, columns in SHAPES:
        weight = make_weight(rows, columns)
        stats = make_statistics(method, rows, columns)
        before = weight.clone()
        size = min(rows, columns)
        full = method.factorize(weight, size, stats)
        if method.bound(size) == size:
            torch.testing.assert_close(full.product(), weight, rtol=RTOL, atol=1e-6)
        if method.shifts:
            torch.testing.assert_close(full.shift, torch.zeros(rows, dtype=torch.float64), rtol=0, atol=1e-6)
        curve = method.error_curve(weight, stats)
        assert curve.shape == (size + 1,)
        zero_error = method.objective(weight, stats)
        torch.testing.assert_close(curve[0], zero_error, rtol=RTOL, atol=ATOL)
        if method.searches:
            halves = torch.arange(size // 2 + 1)
            assert (curve[2 * halves] <= curve[halves]).all(), "twice the rank must be better"
        else:
            assert (curve.diff() <= ATOL * zero_error).all(), "the error must not rise with the rank"
        for rank in (1, size // 2, size - 1):
            factors = method.factorize(weight, rank, stats)
            inner = rank if method.thin else factors.left.shape[1]
            assert factors.left.shape == (rows, inner)
            assert factors.right.shape == (inner, columns)
            assert (factors.shift is not None) == method.shifts
            assert factors.layout == method.layout(rows, columns, rank)
            achieved = method.objective(weight - factors.product(), stats)
            torch.testing.assert_close(achieved, curve[rank], rtol=1e-5, atol=1e-9 * float(zero_error))
            assert abs(factors.relative_error - float((achieved / zero_error).sqrt())) < 1e-4
            if method.thin:
                terms = method.bound(rank)
                plain = weight
                if terms:
                    left, right, _ = truncated_svd(weight, terms)
                    plain = weight - left @ right
                assert achieved <= method.objective(plain, stats) * (1 + RTOL) + ATOL
            again = method.factorize(weight, rank, stats)
            assert torch.equal(again.left, factors.left)
            assert torch.equal(again.right, factors.right)
        if method.nested:
            _check_nested(method, weight, stats, full)
        assert torch.equal(weight, before), "the weight must not be written to"
        singular = make_statistics(method, rows, columns, tokens=columns // 3)
        unseen = OnlyDeclared({name: torch.zeros_like(statistic) for name, statistic in stats.items()})
        for degeneracy in DEGENERACIES:
            degenerate = make_weight(rows, columns, degeneracy=degeneracy)
            for some in (stats, singular, unseen):
                factors = method.factorize(degenerate, size // 2, some)
                assert torch.isfinite(factors.left).all()
                assert torch.isfinite(factors.right).all()
                achieved = float(method.objective(degenerate - factors.product(), some))
                zero_error = float(method.objective(degenerate, some))
                expected = max(achieved / zero_error, 0) ** 0.5 if zero_error > 0 else 0.0
                assert abs(factors.relative_error - expected) < 1e-4, degeneracy
        for dtype in (torch.float32, torch.bfloat16):
            factors = method.factorize(weight.to(dtype), size // 2, stats)
            assert factors.left.dtype == torch.float64


def _check_nested(method, weight, stats, full):
    """The laws of methods whose factors grow by one column and row a rank; `full` are those at full rank."""
    gradient = make_weight(*weight.shape, seed=7)
    curve = method.loss_curve(weight, {**stats, "weight_gradient": gradient})
    torch.testing.assert_close(curve[0], -(gradient * weight).sum(), rtol=RTOL, atol=1e-6)
    for rank in (1, len(curve) // 2, len(curve) - 1):
        product = method.factorize(weight, rank, stats).product()
        torch.testing.assert_close(full.left[:, :rank] @ full.right[:rank], product, rtol=RTOL, atol=1e-6)
        torch.testing.assert_close(curve[rank], (gradient * (product - weight)).sum(), rtol=RTOL, atol=1e-6)


def _check_start(method):
    """The laws of methods whose factors are where training begins."""
    for rows, columns in SHAPES:
        weight = make_weight(rows, columns)
        before = weight.clone()
        one, again, other = (method.factorize(weight, 6, {"seed": seed}) for seed in (3, 3, 4))
        assert torch.equal(weight, before), "the weight must not be written to"
        assert one.left.shape == (rows, 6)
        assert one.right.shape == (6, columns)
        assert one.relative_error is None
        assert one.layout == method.layout(rows, columns, 6)
        assert torch.equal(one.product(), again.product())
        assert torch.equal(one.right, again.right)
        assert not torch.equal(one.right, other.right)
        assert torch.isfinite(one.product()).all()
