"""Lower the ranks of weights while they are trained, so that factorizing them in the end changes next to nothing."""

import logging
import re

import torch

from ..checks import check_boolean, check_integer, check_number
from ..errors import ConfigError, TargetError
from ..formats import LowRankLinear
from ..integrations import LowRankConfig, factorize
from ..linalg import energy_rank, low_rank_projection
from ..recipe import DENSE
from ..surgery import all_sites, factorized
from ._base import WeightCallback, add_site_buffer, remove_buffers, share, site_buffer, trainable_sites


logger = logging.getLogger(__name__)

MODES = ("prox", "subgradient")


class TrainedRankPruningCallback(WeightCallback):
    r"""Projects weights to low rank every few optimizer steps, with a nuclear norm that may lower it further.

        before step t, where t % period == 0:    U S V^T = svd(W),
        W <- U_r S_r V_r^T,    r = min {r : sum_{i <= r} S_i^2 >= energy sum_i S_i^2},
        subgradient: dW += nuclear_weight U_r V_r^T in this step,
        prox: S_i <- max(S_i - lr nuclear_weight, 0) before the projection

    In between weights are free. Steps are those of the optimizer, however many micro-batches they have. When training
    ends, the weights become factors of the ranks of the last projection: a factorized model like any other.

    `"subgradient"` is the paper's, for SGD. AdamW divides every gradient by a mean of its past size, so that what is
    added to one loses its scale: where the loss is nearly flat, the smallest `nuclear_weight` moves a weight by the
    whole learning rate. `"prox"` never goes through the optimizer, as AdamW's own weight decay does not: it is the
    exact proximal step of the norm, with the learning rate that the weight has in this step.

    Args:
        energy (`float`, *optional*): share of the squared weight that a projection keeps, in (0, 1]; at 1 nothing is
            cut. Defaults to 0.98 where no `param_ratio` is given.
        period (`int`, defaults to 20): optimizer steps from one projection to the next, at least 1.
        nuclear_weight (`float`, defaults to 3e-4): of the nuclear norm, at least 0. `"prox"` takes the learning rate
            times this off every singular value: the default, which is the paper's for SGD, is too little to see at
            the learning rates of AdamW.
        nuclear_mode (`str`, defaults to `"prox"`): `"prox"` or `"subgradient"`.
        param_ratio (`float`, *optional*): instead of `energy`, the same fraction of its parameters for every weight,
            in (0, 1]: r = floor(param_ratio out in / (out + in)).
        factorize_at_end (`bool`, defaults to `True`): whether training ends with factors; otherwise with the weights
            as they are, and [`TrainedRankPruningCallback.ranks`].
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): as in [`LowRankConfig`].
        exclude_modules (`str` or `list[str]`, *optional*): likewise.

    Raises:
        ConfigError: a value that is not allowed; before the first step, a period longer than the run, fp16 or
            DeepSpeed.
        TargetError: when `Trainer` is made, a pattern that matches nothing, a frozen weight, or, with
            `factorize_at_end`, a model that is factorized in part; before the first step, weights that are split over
            processes.
        CheckpointError: before the first step, a checkpoint without the state of this callback.
        NonFiniteError: a weight holds NaN or infinity where it is to be projected.

    Reference:
        TRP, Xu et al., IJCAI 2020, https://arxiv.org/abs/1812.02402 and https://arxiv.org/abs/2004.14566. The period
        of 20 and the discarded energy of 0.02 are the paper's, from memory; the authors' code has 0.9 and projects
        every step. Differs: `"prox"` and `param_ratio` are ours; linear layers instead of convolutions, at the ranks
        of the last projection instead of all singular values above 0.05.
    """

    prefix = "trained_rank_pruning"

    def __init__(
        self,
        energy=None,
        period=20,
        nuclear_weight=3e-4,
        nuclear_mode="prox",
        param_ratio=None,
        factorize_at_end=True,
        target_modules="all-linear",
        exclude_modules=None,
    ):
        if energy is not None and param_ratio is not None:
            raise ConfigError(f"Give one budget, not `energy`={energy!r} and `param_ratio`={param_ratio!r}.")
        for name, value in (("energy", energy), ("param_ratio", param_ratio)):
            if value is not None:
                check_number(name, value, 0, 1, open_low=True)
        check_integer("period", period, 1)
        check_number("nuclear_weight", nuclear_weight, 0)
        check_boolean("factorize_at_end", factorize_at_end)
        if nuclear_mode not in MODES:
            raise ConfigError(f"`nuclear_mode`={nuclear_mode!r} must be one of {list(MODES)}.")
        self.energy = 0.98 if energy is None and param_ratio is None else energy
        self.period = period
        self.nuclear_weight = nuclear_weight
        self.nuclear_mode = nuclear_mode
        self.param_ratio = param_ratio
        self.factorize_at_end = factorize_at_end
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        # Of a step between its projection and the optimizer.
        self._directions = {}

    def check_schedule(self, max_steps):
        if self.period > max_steps:
            raise ConfigError(
                f"`period`={self.period} exceeds the {max_steps} steps of the run, which would project once, before "
                "anything is trained; lower it, or train longer."
            )

    def register(self, model):
        if self.factorize_at_end and factorized(model):
            raise TargetError(
                f"{next(iter(factorized(model)))} is factorized already, so that the run could not end with factors; "
                "call hf_lowrank.to_dense(model) first, or give `factorize_at_end=False`."
            )
        for site in trainable_sites(model, self.target_modules, self.exclude_modules):
            add_site_buffer(model, site, self.prefix, "rank", torch.zeros((), dtype=torch.int64))

    def start(self, model):
        for _, rank in self._recorded(model):
            rank.zero_()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        adaptive = any("betas" in group for group in optimizer.param_groups)
        if self.nuclear_mode == "subgradient" and self.nuclear_weight and adaptive:
            logger.warning(
                "`nuclear_mode`='subgradient' adds to gradients that an adaptive optimizer normalizes, so that "
                "`nuclear_weight`=%g is no weight any more; use 'prox', or SGD.",
                self.nuclear_weight,
            )

    @torch.no_grad()
    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.period:
            return
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for site, rank in self._recorded(model):
            parameter = model.get_parameter(site.weight_name)
            rate = float(rates.get(id(parameter), 0)) if self.nuclear_mode == "prox" else 0.0
            weight, direction = parameter.detach(), torch.zeros_like(parameter)
            matrices = (site.kind.oriented(model, site, tensor) for tensor in (weight, direction))
            rank.fill_(max(self._project(*pair, rate * self.nuclear_weight) for pair in zip(*matrices, strict=True)))
            # Decompositions of equal weights differ in last bits between kinds of hardware.
            for tensor in (weight, rank, direction) if self._adds else (weight, rank):
                share(tensor)
            if self._adds:
                self._directions[site.name] = direction

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for site, _ in self._recorded(model) if self._directions else ():
            weight = model.get_parameter(site.weight_name)
            if weight.grad is not None:
                weight.grad.add_(self._directions[site.name], alpha=self.nuclear_weight)
        self._directions = {}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        recorded = self._recorded(model)
        remove_buffers(model, self.prefix)
        if not self.factorize_at_end:
            for site, rank in recorded:
                add_site_buffer(model, site, self.prefix, "rank", rank, persistent=False)
            return
        pattern = {rf"^{re.escape(site.name)}": _stored(site, int(rank)) for site, rank in recorded}
        budget = {"energy": self.energy} if self.param_ratio is None else {"param_ratio": self.param_ratio}
        targets = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        factorize(model, LowRankConfig(method="svd", rank_pattern=pattern, **budget, **targets))

    def ranks(self, model):
        """`{module: rank}` of the last projection, in training or after it; empty of a model that is factorized."""
        return {site.name: int(rank) for site, rank in self._recorded(model)}

    @property
    def _adds(self):
        return self.nuclear_mode == "subgradient" and self.nuclear_weight > 0

    def _recorded(self, model):
        found = ((site, site_buffer(model, site, self.prefix, "rank")) for site in all_sites(model))
        return [(site, rank) for site, rank in found if rank is not None]

    def _project(self, matrix, direction, shrink):
        """Project `matrix` in place, write what the norm points along into `direction`, and return the rank."""

        def rank_of(energies):
            if self.param_ratio is None:
                return max(1, energy_rank(energies, self.energy))
            rows, columns = matrix.shape
            return min(max(1, int(self.param_ratio * rows * columns / (rows + columns))), len(energies))

        projected, along, rank = low_rank_projection(matrix, rank_of, shrink)
        # What is left whole keeps its bits.
        if shrink or (self.energy != 1 and rank < min(matrix.shape)):
            matrix.copy_(projected)
        direction.copy_(along)
        return rank


def _stored(site, rank):
    """What the layer becomes: factors of a rank that its kernel can read, or dense where they are no smaller."""
    rank += -rank % site.kind.min_rank_multiple
    return rank if rank < LowRankLinear.break_even(site.out_features, site.in_features) else DENSE
