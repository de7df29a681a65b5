"""Square roots of positive semi-definite matrices that never fail silently."""

import warnings

import torch

from ..errors import NonFiniteError, NotPSDError, NumericalWarning


# Of the mean diagonal, what a shrunk matrix has everywhere.
FLOOR = 1e-4
JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)


def shrink(gram, amount, target="identity"):
    r"""Shrink towards a matrix that is known better: `(1 - a) C + a T`, with `a` in [0, 1].

    T is `mean(diag C) I` for `"identity"`; for `"diagonal"`, which keeps how much channels differ, `diag C`, of which
    no entry counts below 1e-4 of their mean.
    """
    if amount == 0:
        return gram
    shrunk, diagonal = gram * (1 - amount), gram.diagonal()
    wanted = diagonal.mean() if target == "identity" else diagonal.clamp(min=FLOOR * diagonal.mean())
    shrunk.diagonal().add_(amount * wanted)
    return shrunk


def psd_sqrt(gram):
    """Some `S` with `S @ S.T == gram` for any positive semi-definite `gram` (singular ones too): `(n, n)`.

    The Cholesky factor where there is one, which takes a tenth of the time; else from the eigendecomposition.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    if info == 0:
        return factor
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def psd_safe_cholesky(gram):
    """Lower Cholesky factor, with a documented jitter ladder.

    Tries `gram + j * mean(diag gram) * I` for j in 0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4 and warns with
    [`NumericalWarning`] about every j > 0 that was needed.

    Raises:
        NonFiniteError: `gram` holds NaN or infinity.
        NotPSDError: even the last jitter does not help.
    """
    if not torch.isfinite(gram).all():
        raise NonFiniteError(f"A Gram matrix of shape {tuple(gram.shape)} holds NaN or infinite values.")
    scale = gram.diagonal().mean()
    for jitter in JITTERS:
        shifted = gram
        if jitter:
            shifted = gram.clone()
            shifted.diagonal().add_(jitter * scale)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if info == 0:
            if jitter:
                warnings.warn(
                    f"A Gram matrix of shape {tuple(gram.shape)} is singular: added {jitter:g} of its mean diagonal. "
                    "More calibration tokens, or a method without an inverse, avoid this.",
                    NumericalWarning,
                    stacklevel=2,
                )
            return factor
    raise NotPSDError(
        f"A Gram matrix of shape {tuple(gram.shape)} is not positive definite after jitter up to {JITTERS[-1]:g} of "
        "its mean diagonal; it is damaged or was accumulated in too low a precision."
    )
