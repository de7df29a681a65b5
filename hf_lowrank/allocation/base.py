"""What an allocator is: numbers in, ranks out. It never sees a weight."""

from dataclasses import dataclass
from typing import ClassVar

from ..registry import Registry


ALLOCATORS = Registry("allocation")
register_allocator = ALLOCATORS.register


@dataclass(frozen=True)
class Candidate:
    """One weight that competes for the budget.

    Costs are whole numbers of whatever the budget counts: parameters, bytes or nanoseconds.

    Args:
        name (`str`): its module, for messages and results.
        out_features (`int`): rows of the weight.
        in_features (`int`): columns of the weight.
        copies (`int`): weights of this shape that share the rank (the experts of a layer), at least 1.
        rank_multiple (`int`): preferred ranks are multiples of it, itself a multiple of `least_rank`.
        least_rank (`int`): what the layer's kernel insists on: ranks are multiples of it.
        cost (`Callable[[int], int]`): of the factors at a rank, for all copies, of biases only those that a method
            adds; grows with the rank.
        break_even (`int`): from this rank on the weight stays dense.
        curve (`list[float]`, *optional*): entry r - 1 is the squared error at rank r, or, for allocators that are
            `first_order`, the change of the loss that its gradient predicts; only for allocators that ask.
        total (`float`, *optional*): the same of the zero matrix, which is that at rank 0; comes with `curve`.
        dense_cost (`int`, *optional*): of the dense weight, for all copies; defaults to its parameters.
        time (`Callable[[int], int]`, *optional*): nanoseconds of one copy's factors at a rank; only for allocators
            that ask.
        dense_time (`int`, *optional*): of one dense copy; comes with `time`.
    """

    name: str
    out_features: int
    in_features: int
    copies: int
    rank_multiple: int
    least_rank: int
    cost: object
    break_even: int
    curve: object = None
    total: float | None = None
    dense_cost: int | None = None
    time: object = None
    dense_time: int | None = None

    def __post_init__(self):
        if self.dense_cost is None:
            object.__setattr__(self, "dense_cost", self.out_features * self.in_features * self.copies)


class Probe:
    """What an allocator may ask of the model: what its outputs become if some weights have a low rank.

    Nothing but numbers passes. Every question costs a factorization of the weights it names and a pass over some
    calibration data.

    Args:
        seed (`int`, defaults to 0): of whatever the allocator draws.
    """

    def __init__(self, seed=0):
        self.seed = seed

    def divergence(self, ranks):
        """Mean Kullback-Leibler divergence, in nats a prediction, of the changed from the dense model's output.

        Args:
            ranks (`dict[str, int]`): of the weights that are replaced by their factors, by the candidates' names; all
                others are dense.
        """
        raise NotImplementedError

    def loss(self, ranks):
        """Mean loss of the changed model, in nats a prediction; `ranks` as in [`Probe.divergence`].

        Raises:
            CalibrationError: the model or the data has no labels to compute a loss from.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Allocator:
    """Base class of allocators; a subclass is one file in `hf_lowrank/allocation`.

    Class attributes:
        needs_curves (`bool`): whether candidates must carry their curves.
        first_order (`bool`): whether these are predicted changes of the loss instead of squared errors.
        statistics (`tuple[str]`): registered statistics that its curves need beside those of the method.
        needs_probe (`bool`): whether `allocate` takes a [`Probe`] as its third argument; such an allocator has a field
            `search_samples`, the calibration sequences that the probe compares outputs on.
        cost (`str`): what candidates' costs and the budget count: `"parameters"` (bytes, where the budget is one of
            bytes) or `"latency"`.
    """

    name: ClassVar[str]
    needs_curves: ClassVar[bool] = False
    first_order: ClassVar[bool] = False
    statistics: ClassVar[tuple] = ()
    needs_probe: ClassVar[bool] = False
    cost: ClassVar[str] = "parameters"

    @property
    def needs_latencies(self):
        """Whether candidates must carry measured times; such an allocator has fields `latencies` and `rows`."""
        return self.cost == "latency"

    def check(self, candidates):
        """Refuse options that do not fit these weights, before anything is measured; curves are not known yet.

        Raises:
            ConfigError: an option names what is not there.
        """

    def allocate(self, candidates, budget):
        """Ranks within a budget.

        Args:
            candidates (`list[Candidate]`): the weights without a fixed rank.
            budget (`float`): what all of them together may cost.

        Returns:
            `dict[str, int | None]`: a rank for each candidate's name; `None` leaves the weight dense.
        """
        raise NotImplementedError
