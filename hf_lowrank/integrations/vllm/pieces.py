"""From what a format stores to the two tables that a layer of vLLM applies, cut to one process.

Every format is a first table that all processes of a column-parallel layer have, and a second one cut by outputs; in
a row-parallel layer the first is cut by inputs, and the second is whole.
"""

from dataclasses import dataclass

import torch


# How what a checkpoint stores is cut: the dimension of outputs, of inputs; None where it is whole.
CUTS = {
    "weight": (0, 1),
    "right.weight": (None, 1),
    "left.weight": (0, None),
    "left.bias": (0, None),
    "basis.weight": (None, 1),
    "coefficients.weight": (None, None),
    "order": (0, None),
    "output_bias": (0, None),
}
BIASES = ("left.bias", "output_bias")


@dataclass(frozen=True)
class Piece:
    """What one module of the checkpoint does in this process.

        t = x first^T,   u = t second^T,   y = u   |   t where there is no second   |   cat(t, u)[order]

    Args:
        first (`torch.Tensor`): `(r, in)`, or `(out, in)` of a dense module.
        second (`torch.Tensor`, *optional*): `(rows, r)`.
        order (`torch.Tensor`, *optional*): `(out,)`, int64 on the CPU, where each output stands in `cat(t, u)`.
    """

    first: torch.Tensor
    second: torch.Tensor | None = None
    order: torch.Tensor | None = None


def stored(spec):
    """The names that a module of this `spec` (`None` if dense) must have in the checkpoint, without its bias.

    Whether a pivoted module has coefficients depends on its size, so that these are no duty.
    """
    if spec is None:
        return ["weight"]
    if spec["format"] == "pivoted":
        return ["basis.weight"] if spec.get("pivots_first") else ["basis.weight", "order"]
    return ["left.weight"] if "basis" in spec else ["right.weight", "left.weight"]


def possible(spec):
    """[`stored`], and what such a module may have beside it."""
    if spec is None:
        return ["weight"]
    if spec["format"] == "pivoted":
        return [*stored(spec), "coefficients.weight", "output_bias"]
    return [*stored(spec), "left.bias"]


def outputs_of(leaf, tensor, rank):
    """How many outputs the whole module has, by one of its tensors; `None` if that does not tell."""
    if leaf == "coefficients.weight":
        return tensor.shape[0] + rank
    return tensor.shape[0] if CUTS[leaf][0] == 0 else None


def cut(leaf, tensor, rows, columns):
    """The part of a stored tensor that belongs to this process.

    Args:
        leaf (`str`): its name in the module, a key of `CUTS`.
        tensor (`torch.Tensor`): all of it.
        rows (`torch.Tensor`): which outputs this process has.
        columns (`slice`): which inputs this process has.
    """
    by_output, by_input = CUTS[leaf]
    if by_input is not None:
        tensor = tensor[:, columns]
    return tensor if by_output is None else tensor[rows]


def dense_piece(tensors, rows):
    """A module that was left as it is."""
    return Piece(tensors["weight"])


def low_rank_piece(tensors, rows):
    """Two factors; those of a shared basis are no different once the basis is there."""
    return Piece(tensors["right.weight"], tensors["left.weight"])


def pivoted_piece(tensors, rows):
    """Every process needs the whole basis, and the coefficients of those of its outputs that are no pivots."""
    basis = tensors["basis.weight"]
    rank = len(basis)
    # Without an order outputs are pivots first, so that the k-th output of the module stands at k.
    place = tensors.get("order", rows).long().cpu()
    others = place >= rank
    second = tensors["coefficients.weight"][place[others] - rank].to(basis) if others.any() else None
    return Piece(basis, second, torch.where(others, rank + others.cumsum(0) - 1, place))


FORMATS = {"low_rank": low_rank_piece, "shared_basis": low_rank_piece, "pivoted": pivoted_piece}


def make_piece(spec, tensors, rows):
    """The [`Piece`] of a module.

    Args:
        spec (`dict`, *optional*): of the checkpoint; `None` for a dense module.
        tensors (`dict[str, torch.Tensor]`): all it stores, cut.
        rows (`torch.Tensor`): `(out,)`, int64, which of the module's outputs these are.
    """
    return (dense_piece if spec is None else FORMATS[spec["format"]])(tensors, rows)
