"""Low-rank approximation in the metric of the layer's own inputs."""

import torch

from .psd import psd_sqrt
from .svd import descending_eigh, require_finite, truncated_svd


def output_optimal(weight, gram, rank):
    r"""The factors that minimise the output error on inputs with Gram matrix `gram`, without any inverse.

        min_{rank r} tr((W - W') C (W - W')^T),    U = eig_r(W C W^T),    W' = U U^T W,
        minimum = sum_{i > r} eig_i(W C W^T).

    The eigenproblem is solved on the smaller side: `W C W^T` where out <= in; else, with `C = S S^T` and `G = W S`,
    `V = eig_r(G^T G)` and `U = qr(G V).Q`. Directions that the inputs never excite do not change the objective; they
    are chosen by plain SVD of what is left, so that full rank gives back `W` itself whatever the rank of `C`.

    Args:
        weight (`torch.Tensor`): `(out, in)`, float64.
        gram (`torch.Tensor`): `C`, `(in, in)`, symmetric positive semi-definite, float64.
        rank (`int`): in `1 .. min(out, in)`.

    Returns:
        `(left, right, energies)`: `(out, rank)` orthonormal, `(rank, in)`, and the `min(out, in)` eigenvalues,
        largest first.

    Raises:
        NonFiniteError: `weight` or `gram` holds NaN or infinity.

    Reference:
        The optimum of SVD-LLM (Wang et al., ICLR 2025, https://arxiv.org/abs/2403.07378) in the inverse-free form that
        Swift-SVD and Dobi-SVD also use. The completion on unexcited directions is ours.
    """
    require_finite(weight, "The weight")
    require_finite(gram, "The Gram matrix of the inputs")
    rows, columns = weight.shape
    if rows <= columns:
        energies, basis = descending_eigh(weight @ gram @ weight.T)
    else:
        image = weight @ psd_sqrt(gram)
        energies, basis = descending_eigh(image.T @ image)
    tolerance = energies[0] * max(rows, columns) * torch.finfo(energies.dtype).eps
    excited = min(rank, int((energies > tolerance).sum()))
    left = basis[:, :excited]
    if rows > columns:
        left = torch.linalg.qr(image @ left).Q
    if excited < rank:
        rest = weight - left @ (left.T @ weight)
        completion = torch.linalg.qr(torch.cat([left, truncated_svd(rest, rank - excited)[0]], dim=1)).Q
        left = torch.cat([left, completion[:, excited:]], dim=1)
    return left, left.T @ weight, energies
