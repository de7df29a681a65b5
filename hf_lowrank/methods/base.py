"""What a method is: a frozen dataclass of options that turns one weight and its statistics into factors."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..registry import Registry


METHODS = Registry("method")
register_method = METHODS.register


@dataclass(frozen=True)
class Factors:
    r"""Two factors and the error they leave, `W ~ left @ right + rest`; perhaps a shift of the bias, `b + shift`.

    Args:
        left (`torch.Tensor`): `(out, r)`, float64.
        right (`torch.Tensor`): `(r, in)`, float64.
        relative_error (`float`, *optional*): `sqrt(objective / objective of the zero matrix)`, in the method's own
            metric, in [0, 1]; `None` from methods that `initialise`.
        shift (`torch.Tensor`, *optional*): `(out,)`, float64, added to the layer's bias; a layer without bias gets
            one. Formats do not see it: whoever replaces the layer adds it. Only from methods that announce it in
            `shifts`.
        rest (`torch.Tensor` or [`Terms`], *optional*): `(out, in)`, float64: what the weight has beside the product;
            sparse and coalesced, or terms over merged modes. Only from methods with `only_format`.
        layout (`dict`): what [`Method.layout`] says of this shape and rank.
        cores (`tuple[torch.Tensor]`): of a tensor train, `(d_{k-1}, i_k, j_k, d_k)`, float64; `left` and `right` are
            the same weight and an identity then. Only from methods that are not `thin`.
    """

    left: torch.Tensor
    right: torch.Tensor
    relative_error: float | None
    shift: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    layout: dict = field(default_factory=dict)
    cores: tuple = ()

    def product(self):
        """The weight that the factors stand for, `(out, in)`."""
        product = self.left @ self.right
        return product if self.rest is None else product + self.rest

    @classmethod
    def from_energies(cls, left, right, energies, shift=None):
        """Factors whose objective at rank r is the tail sum of `energies` beyond r."""
        total = energies.sum()
        tail = energies[left.shape[1] :].sum()
        return cls(left, right, float((tail / total).sqrt()) if total > 0 else 0.0, shift)


@dataclass(frozen=True)
class Method:
    """Base class of methods; a subclass is one file in `hf_lowrank/methods`, registered by `register_method`.

    Class attributes:
        statistics (`tuple[str]`): registered statistics it reads, and no others; empty for data-free methods.
        format (`str`): the format its factors are stored in unless the user chooses another.
        allocation (`str`): the allocator unless the user chooses another; a global one only suits errors that are in
            the same unit for every layer.
        joint_groups (`tuple[tuple[str]]`): names or dotted suffixes of linears beside each other that share a basis;
            a method that offers this makes it a field.
        share_layers (`int`): how many neighbouring blocks share a basis; likewise.
        anchored (`bool`): whether each weight is factorized on what the compressed model in front of it puts out; it
            is then given `compressed_gram` and `cross_gram` ([`CrossGram`]) beside its statistics.
        only_format (`bool`): whether its factors fit into `format` and no other.
        thin (`bool`): whether the weight it makes is a product of two factors of the rank. Of others the rank is a
            size of parts, whose weight has any rank.
        searches (`bool`): whether it finds good factors rather than the best ones, so that the error may rise a little
            from one rank to the next.
        nested (`bool`): whether the factors at a rank are the leading columns and rows of those at any higher one.
        initialises (`bool`): whether its factors do not approximate the weight, but are where training from scratch
            begins. It is then given a `seed` (`int`) beside its statistics, which differs from layer to layer, and has
            neither objective nor error curve.
    """

    name: ClassVar[str]
    statistics: ClassVar[tuple] = ()
    format: ClassVar[str] = "low_rank"
    allocation: ClassVar[str] = "uniform"
    joint_groups: ClassVar[tuple] = ()
    share_layers: ClassVar[int] = 1
    anchored: ClassVar[bool] = False
    only_format: ClassVar[bool] = False
    thin: ClassVar[bool] = True
    searches: ClassVar[bool] = False
    nested: ClassVar[bool] = False
    initialises: ClassVar[bool] = False

    @property
    def shifts(self):
        """Whether its factors carry a `shift` of the bias; known before any weight is, so that room is made for it."""
        return False

    def terms(self, rank):
        """How many of `rank` rows of `right` one row of the weight combines; fewer than all where `left` is sparse."""
        return rank

    def bound(self, rank):
        """The rank of a plain SVD whose error is never exceeded, in the method's objective; by default `terms`.

        Of a method that says 0, only that it beats the zero matrix.
        """
        return self.terms(rank)

    def layout(self, out_features, in_features, rank):
        """What the spec of a layer of this shape says beside its format and rank: a JSON dict, `{}` by default."""
        return {}

    def counted(self, format, out_features, in_features, rank):
        """The numbers that a budget of parameters counts for a layer of this shape: by default all that are stored.

        A budget in bytes counts what is stored, whatever this says.

        Args:
            format (`type`): a [`FormatLinear`].
            out_features (`int`): rows of the weight.
            in_features (`int`): columns of the weight.
            rank (`int`): of the factors.
        """
        return format.cost(out_features, in_features, rank, **self.layout(out_features, in_features, rank))

    def factorize(self, weight, rank, stats):
        """Factors of `weight` at `rank`.

        Args:
            weight (`torch.Tensor`): `(out, in)`, any floating dtype; computed in float64.
            rank (`int`): in `1 .. min(out, in)`.
            stats (`dict[str, torch.Tensor]`): one entry for each name in `statistics`.

        Returns:
            [`Factors`]
        """
        raise NotImplementedError

    def objective(self, difference, stats):
        """The squared error that `factorize` minimises, as a function of `W - W'` `(out, in)`, float64."""
        raise NotImplementedError

    def error_curve(self, weight, stats):
        """The objective at every rank: entry r is the squared error at rank r, `(min(out, in) + 1,)`, float64.

        Entry 0 is the error of the zero matrix. By default the tail sums of what `energies` returns.
        """
        energies = self.energies(weight, stats)
        return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])

    def loss_curve(self, weight, stats):
        """The first-order change of the loss at every rank, `<D, W_r - W>`, in the shape of `error_curve`.

        Of methods that are `nested`. `stats` hold `weight_gradient`, D, beside what the method reads.
        """
        size = min(weight.shape)
        factors = self.factorize(weight, size, stats)
        dropped = -((stats["weight_gradient"].double() @ factors.right.T) * factors.left).sum(0)
        return torch.cat([dropped.flip(0).cumsum(0).flip(0), dropped.new_zeros(1)])

    def energies(self, weight, stats):
        """What each further rank takes off the objective, `(min(out, in),)`, largest first, float64."""
        raise NotImplementedError
