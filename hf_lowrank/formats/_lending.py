"""What formats share of which several layers can apply one linear first."""

from torch import nn

from ..errors import DAMAGED, CheckpointError, LowRankError
from .base import FORMATS, FormatLinear, shape_of


class LendingLinear(FormatLinear):
    """Base class of formats whose layers can have the linear that they apply first in common.

    One layer, the lender, holds that linear as a child; the others reach it through the lender. So it is one parameter
    under one name: counted once, stored once, trained by the gradients of all its layers, and whatever replaces it (an
    adapter, a quantized linear) serves them all. `lent` names its weight, and its constructor takes `borrows`.
    """

    def __init__(self, in_features, out_features, transposed=False):
        super().__init__(in_features, out_features, transposed)
        # In a tuple, where the parameters of the lender are not found a second time.
        self._lender = ()

    @classmethod
    def _child(cls):
        """The name of the child that can be lent."""
        return cls.lent[0].rpartition(".")[0]

    @property
    def lender(self):
        """The layer that holds the basis of this one; `None` where that is this layer itself."""
        return self._lender[0] if self._lender else None

    @property
    def basis(self):
        """The linear that this layer applies first, its own or its lender's."""
        found = getattr(self.lender or self, self._child())
        if found is None:
            raise LowRankError(
                "This layer borrows its basis from another one, which it has not been given; load or copy the whole "
                "model, or call `borrow`."
            )
        return found

    def borrow(self, lender):
        """Use the basis of `lender` from now on, and drop the own one.

        Args:
            lender ([`LendingLinear`]): of the same format, holds a basis of the same inputs and rank.

        Raises:
            CheckpointError: the two do not fit together.
        """
        found = None
        if isinstance(lender, FORMATS[self.name]) and lender is not self:
            basis = getattr(lender, self._child())
            found = None if basis is None else (shape_of(basis)[0], lender.in_features, lender.own_dtype)
        wanted = (self.rank, self.in_features, self.own_dtype)
        if found != wanted:
            raise CheckpointError(
                f"A layer of (rank, inputs, dtype) {wanted} cannot borrow the basis of "
                f"{type(lender).__name__ if found is None else f'a layer of {found}'}; the lender holds a basis of "
                f"its own and agrees in all three. {DAMAGED}"
            )
        setattr(self, self._child(), None)
        self._lender = (lender,)

    @property
    def own_dtype(self):
        """The dtype of what this layer holds beside the basis."""
        raise NotImplementedError

    def projected(self, x):
        """What the basis makes of inputs `x`, on their device."""
        basis = self.basis
        # An offloaded basis is on the meta device until its hook fetches it, and moves the input to it.
        there = x if basis.weight.is_meta else x.to(basis.weight.device)
        return basis(there).to(x.device)

    def release(self, borrowers):
        """Hand the own basis on to the first of `borrowers`, and keep a copy that is nobody else's.

        Args:
            borrowers (`list[LendingLinear]`): all layers that borrow from this one.
        """
        child, (heir, *others) = self._child(), borrowers
        basis = getattr(self, child)
        setattr(heir, child, basis)
        heir._lender = ()
        for other in others:
            other._lender = (heir,)
        own = basis.weight
        copied = nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
        copied.weight = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
        setattr(self, child, copied)

    def extra_repr(self):
        return f"{super().extra_repr()}, borrows={self.lender is not None}"
