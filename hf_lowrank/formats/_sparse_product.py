"""A product with a low-rank plus sparse matrix whose training keeps the parts, never the matrix."""

import torch
from torch.nn.functional import linear


class SparseLowRankProduct(torch.autograd.Function):
    r"""`x W^T` for `W = c L R + S`; what stands between forward and backward is x, L, R and the entries of S.

    With g the gradient of the output and `G = g^T x`, a matrix of the size of W that lives during the backward pass of
    one layer only:

        dL = c G R^T,    dR = c L^T G,    dv = G.flat[indices],    dx = g W

    A plain formula would keep W from the forward to the backward pass, in every layer as much as a dense weight takes.

    Shapes:
        x `(..., in)`, left `(out, r)`, right `(r, in)`, values `(n,)`, indices `(n,)` of the entries of a flattened
        `(out, in)`, all different; returns `(..., out)` in the dtype of x, to which all others are cast.

    Reference:
        Han et al., SLTrain, NeurIPS 2024, https://arxiv.org/abs/2406.02214, section 3. Differs: with few rows x the
        thin factors are applied one after the other, which is cheaper than to form their product.
    """

    @staticmethod
    def forward(ctx, x, left, right, values, indices, scaling):
        ctx.save_for_backward(x, left, right, values, indices)
        ctx.scaling = scaling
        return times(x, left, right, values, indices, scaling)

    @staticmethod
    def backward(ctx, gradient):
        x, left, right, values, indices = ctx.saved_tensors
        found = [None] * 6
        if ctx.needs_input_grad[0]:
            # g W is the same product with W^T = c R^T L^T + S^T.
            found[0] = times(gradient, left, right, values, indices, ctx.scaling, transposed=True)
        if any(ctx.needs_input_grad[1:4]):
            outer = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[1]:
                found[1] = (outer @ right.to(x.dtype).T * ctx.scaling).to(left.dtype)
            if ctx.needs_input_grad[2]:
                found[2] = (left.to(x.dtype).T @ outer * ctx.scaling).to(right.dtype)
            if ctx.needs_input_grad[3]:
                found[3] = outer.flatten()[indices.long()].to(values.dtype)
        return tuple(found)


def times(x, left, right, values, indices, scaling, transposed=False):
    """`x W^T`, or `x W` if `transposed`, by the cheaper of two orders; arguments as in [`SparseLowRankProduct`]."""
    rows, columns = left.shape[0], right.shape[1]
    if x.numel() // x.shape[-1] * (rows + columns) >= rows * columns:
        weight = merged(left, right, values, indices, scaling).to(x.dtype)
        return linear(x, weight.T if transposed else weight)
    left, right = left.to(x.dtype), right.to(x.dtype)
    sparse = scattered(values, indices, rows, columns).to(x.dtype)
    if transposed:
        return linear(linear(x, left.T), right.T) * scaling + linear(x, sparse.T)
    return linear(linear(x, right), left) * scaling + linear(x, sparse)


def merged(left, right, values, indices, scaling):
    """`c L R + S`, computed in float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    product = left.to(wide) @ right.to(wide) * scaling
    return product + scattered(values.to(wide), indices, *product.shape)


def scattered(values, indices, rows, columns):
    """The sparse part as an ordinary matrix."""
    return values.new_zeros(rows * columns).scatter(0, indices.long(), values).view(rows, columns)
