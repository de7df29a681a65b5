"""How a chain of cores meets its inputs: core by core, in parts, or as the matrix; whichever takes least."""

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, pad

from ..linalg import joined_cores


@dataclass(frozen=True)
class Route:
    """One way to multiply.

    Args:
        groups (`tuple`): what is applied one after the other, in the order of the chain: trees of core numbers, joined
            first as `(left, right)` says.
        from_left (`bool`): whether the first group comes first, rather than the last.
        fixed (`int`): multiplications that join the cores of groups, whatever the input.
        each (`int`): multiplications a token.
    """

    groups: tuple
    from_left: bool
    fixed: int
    each: int


@functools.lru_cache(maxsize=4096)
def routes(out_features, in_features, out_shape, in_shape, bonds):
    """`((fewest tokens, Route), ...)`, rising: which route takes the fewest multiplications from how many tokens on.

    Looked at are all ways to cut the chain into groups of neighbours, each joined in its best order, that are then
    applied from either end. One group is the whole matrix.
    """
    ends = (1, *bonds, 1)
    count = len(out_shape)

    @functools.cache
    def joined(first, last):
        """`(multiplications, tree)` of the cores `first .. last`."""
        if first == last:
            return 0, first
        found = []
        for cut in range(first, last):
            (left, one), (right, other) = joined(first, cut), joined(cut + 1, last)
            sizes = out_shape[first : last + 1] + in_shape[first : last + 1]
            own = ends[first] * math.prod(sizes) * ends[cut + 1] * ends[last + 1]
            found.append((left + right + own, cut, (one, other)))
        cost, _, tree = min(found, key=lambda entry: entry[:2])
        return cost, tree

    def route(cuts, from_left):
        parts = list(zip((0, *cuts), (*(cut - 1 for cut in cuts), count - 1), strict=True))
        fixed = sum(joined(*part)[0] for part in parts)
        trees = tuple(joined(*part)[1] for part in parts)
        if len(parts) == 1:
            return Route(trees, from_left, fixed, out_features * in_features)
        each = 0
        for first, last in parts:
            size = ends[first] * math.prod(out_shape[first : last + 1] + in_shape[first : last + 1]) * ends[last + 1]
            before, after = (out_shape, in_shape) if from_left else (in_shape, out_shape)
            each += math.prod(before[:first]) * size * math.prod(after[last + 1 :])
        return Route(trees, from_left, fixed, each)

    found = []
    for chosen in range(2 ** (count - 1)):
        cuts = tuple(k for k in range(1, count) if chosen >> (k - 1) & 1)
        found.extend(route(cuts, from_left) for from_left in (False, True)[: 2 if cuts else 1])
    return _envelope(found)


def _envelope(found):
    """The routes that are best for some number of tokens, with the least such number."""
    tokens, best = 1, min(found, key=lambda route: (route.fixed + route.each, route.each))
    kept = [(tokens, best)]
    while True:
        rivals = [route for route in found if route.each < best.each]
        if not rivals:
            return tuple(kept)
        starts = [((route.fixed - best.fixed) // (best.each - route.each) + 1, route.each) for route in rivals]
        place = min(range(len(rivals)), key=lambda index: starts[index])
        tokens, best = starts[place][0], rivals[place]
        kept.append((tokens, best))


def apply_train(x, cores, table, out_features):
    """`x @ W.T` for the train `cores`.

    Args:
        x (`torch.Tensor`): `(..., in)`.
        cores (`list[torch.Tensor]`): `(d_{k-1}, i_k, j_k, d_k)`.
        table: of [`routes`].
        out_features (`int`): rows of the result that are no padding.
    """
    route = table[-1][1]
    # An exported program serves any number of tokens, and takes what is best for many.
    if len(table) > 1 and not torch.compiler.is_exporting():
        tokens = x.numel() // x.shape[-1]
        route = next((other for fewest, other in reversed(table) if tokens >= fewest), table[0][1])
    groups = [_joined(tree, cores) for tree in route.groups]
    if len(groups) == 1:
        return linear(x, groups[0][0, :out_features, : x.shape[-1], :].squeeze(-1))
    padding = math.prod([core.shape[2] for core in cores]) - x.shape[-1]
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    flat = pad(flat, (0, padding)) if padding else flat
    y = _from_left(flat, groups) if route.from_left else _from_right(flat, groups)
    y = y[:, :out_features] if y.shape[1] > out_features else y
    return y.reshape(*x.shape[:-1], out_features)


def _joined(tree, cores):
    return cores[tree] if isinstance(tree, int) else joined_cores(*(_joined(part, cores) for part in tree))


def _from_right(x, groups):
    """Cores from the last to the first, each as the matrix that it is stored as."""
    tokens, done, left = x.shape[0], 1, math.prod([core.shape[2] for core in groups[:-1]])
    # (tokens, outputs so far, inputs to come, inputs and bond of this core)
    z = x.reshape(tokens, done, left, groups[-1].shape[2])
    for k in range(len(groups) - 1, -1, -1):
        d, i, j, e = groups[k].shape
        z = linear(z, groups[k].reshape(d * i, j * e))
        if k:
            own = groups[k - 1].shape[2]
            left //= own
            z = (
                z.view(tokens, done, left, own, d, i)
                .permute(0, 5, 1, 2, 3, 4)
                .reshape(tokens, i * done, left, own * d)
            )
            done *= i
    return z.transpose(1, 3).flatten(1)


def _from_left(x, groups):
    """Cores from the first to the last."""
    tokens, done, left = x.shape[0], 1, math.prod([core.shape[2] for core in groups[1:]])
    # (tokens, outputs so far, inputs to come, bond and inputs of this core)
    z = x.reshape(tokens, done, groups[0].shape[2], left).transpose(2, 3)
    for k, core in enumerate(groups):
        d, i, j, e = core.shape
        z = linear(z, core.permute(1, 3, 0, 2).reshape(i * e, d * j))
        if k + 1 < len(groups):
            own = groups[k + 1].shape[2]
            left //= own
            z = (
                z.view(tokens, done, own, left, i, e)
                .permute(0, 1, 4, 3, 5, 2)
                .reshape(tokens, done * i, left, e * own)
            )
            done *= i
    return z.flatten(1)
