"""A tensor as a sum of outer products of vectors (canonical polyadic decomposition), by alternating least squares."""

import math

import torch

from ..errors import ConfigError
from .svd import require_finite


def cp_product(factors):
    """The tensor `(I_0, .., I_{N-1})` of `factors`, `(R, I_n)` each: `sum_r f_0[r] outer .. outer f_{N-1}[r]`."""
    half = (len(factors) + 1) // 2
    product = _outer(factors[:half]).T @ _outer(factors[half:])
    return product.view([factor.shape[1] for factor in factors])


def cp_als(tensor, rank, seed=0, start=None, tolerance=1e-3, sweeps=100):
    r"""Sum of `rank` outer products near `tensor`, found by alternating least squares.

        min_{f_0 .. f_{N-1}} |X - sum_r f_0[r] outer .. outer f_{N-1}[r]|_F^2,
        f_n = (*_{m != n} f_m f_m^T)^+ (X contracted with all f_m, m != n),    n = 0, .., N - 1, 0, ..

    with * the elementwise product. Each step is the exact minimum for what the others hold, so that the error never
    rises, and it is at most that of the zero tensor from the first sweep on. What is found is a stationary point, and
    depends on the start. Computed in float64; vectors of a term come out with equal norms.

    Args:
        tensor (`torch.Tensor`): `(I_0, .., I_{N-1})` with N of at least 2, any floating dtype.
        rank (`int`): terms R, at least 1.
        seed (`int`, defaults to 0): of the start, drawn from a normal distribution on the CPU.
        start (`list[torch.Tensor]`, *optional*): the factors to start from instead.
        tolerance (`float`, defaults to 1e-3): ends the search when a sweep lowers the relative error by less.
        sweeps (`int`, defaults to 100): the most that are made, at least 1.

    Returns:
        `list[torch.Tensor]`: N factors `(R, I_n)`, float64.

    Raises:
        ConfigError: a tensor with fewer than two modes.
        NonFiniteError: `tensor` holds NaN or infinity.

    Reference:
        Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, section 3.4.
    """
    require_finite(tensor, "The tensor")
    if tensor.ndim < 2:
        raise ConfigError(f"`tensor` of cp_als has {tensor.ndim} modes, and needs two at least.")
    tensor = tensor.double()
    total = float(tensor.norm())
    if total == 0:
        return [torch.zeros(rank, size, dtype=torch.float64, device=tensor.device) for size in tensor.shape]
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(rank, size, generator=generator, dtype=torch.float64) for size in tensor.shape]
        best, least = [factor.to(tensor.device) for factor in drawn], float("inf")
    else:
        best = [factor.double() for factor in start]
        least = float((tensor - cp_product(best)).norm()) / total
    for _ in range(sweeps):
        factors = _even(_swept(tensor, list(best)))
        error = float((tensor - cp_product(factors)).norm()) / total
        if not error < least:
            # A nearly singular Gram matrix costs more than the sweep has won.
            break
        gain, best, least = least - error, factors, error
        if gain < tolerance:
            break
    return best


def _swept(tensor, factors):
    """`factors` after one least-squares step for each; modes in halves, of which the other is contracted once."""
    half = (tensor.ndim + 1) // 2
    matrix = tensor.reshape(math.prod(tensor.shape[:half]), -1)
    for own, other, seen in (
        (range(half), range(half, tensor.ndim), matrix),
        (range(half, tensor.ndim), range(half), matrix.T),
    ):
        contracted = seen @ _outer([factors[mode] for mode in other]).T
        contracted = contracted.view([*(tensor.shape[mode] for mode in own), -1])
        for mode in own:
            # (I_mode, sizes of the other modes of this half, R)
            rest = [one for one in own if one != mode]
            image = contracted.movedim(mode - own[0], 0)
            for one in reversed(rest):
                image = (image * factors[one].T).sum(-2)
            gram = torch.stack([factor @ factor.T for one, factor in enumerate(factors) if one != mode]).prod(0)
            # Terms may come to be the same, which leaves the Gram matrix singular.
            factors[mode] = torch.linalg.pinv(gram, hermitian=True) @ image.T
    return factors


def _outer(factors):
    """For every term the outer product of its vectors in some modes, `(R, product of their sizes)`."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None, :]).flatten(1)
    return product


def _even(factors):
    """The same terms with vectors of equal norms; a term with a vector of zeros is all zeros."""
    norms = torch.stack([factor.norm(dim=1) for factor in factors])
    mean = norms.log().mean(0).exp()
    scales = torch.where(mean > 0, mean / norms, 0.0).nan_to_num(0.0, 0.0, 0.0)
    return [factor * scale[:, None] for factor, scale in zip(factors, scales, strict=True)]
