"""Dimension squeezing: lower the bonds of tensor trains one after the other, and train in between."""

import logging
import math

import torch

from ..checks import check_integer, check_number
from ..errors import ConfigError, TargetError
from ..formats import LinearFace, TensorTrainLinear
from ..integrations import to_dense
from ..kinds import dense_kind
from ..linalg import bond_cores, lowered_bond
from ..surgery import factorized
from ._base import WeightCallback, remove_buffers, share


logger = logging.getLogger(__name__)


class DimensionSqueezingCallback(WeightCallback):
    r"""Shrinks tensor trains while they are trained, always where it is estimated to hurt least.

        gap(bond k, b) = sqrt(sum_{i > b} s_i^2) / |W|_F,    s = singular values of the weight unfolded at bond k

    Every `period` steps, of all bonds in the model, those with the least gap are lowered by `step`, at the least error
    of the weight ([`lowered_bond`]), as long as the gap is at most `max_gap`; the steps until the next event make up
    for it. What is lowered stays in place as zeros, which the optimizer does not move, and is cut off when training
    ends; a layer that is not smaller than dense by then becomes dense. Which components are out is read off the cores,
    so that a run that goes on from a checkpoint ends in the same bits.

    Only bonds are lowered whose neighbours can still be filled. The central core is lowered too, even where
    `train_only(model, "auxiliary")` has frozen it.

    Args:
        max_gap (`float`, defaults to 0.02): no gap above it is made, in [0, 1].
        period (`int`, defaults to 100): optimizer steps between events, at least 1 and at most those of the run.
        step (`int`, defaults to 1): by how much a bond is lowered at once, at least 1.
        squeezes (`int`, defaults to 1): layers in which one bond is lowered at an event, at least 1.

    Raises:
        ConfigError: a value that is not allowed; when `Trainer` is made or training begins, a period longer than the
            run, fp16, or DeepSpeed.
        TargetError: no `tensor_train` layer, one with adapters, or weights that are split over processes.

    Reference:
        Dimension squeezing of MPOP, ACL 2021, from memory: the paper truncates the bond with the least estimated gap,
        fine-tunes, and repeats until the gap of the model's quality exceeds a bound. Differs: the bound is on the
        estimate; several components, and several layers, can be squeezed at once.
    """

    prefix = "dimension_squeezing"

    def __init__(self, max_gap=0.02, period=100, step=1, squeezes=1):
        check_number("max_gap", max_gap, 0, 1)
        for name, value in (("period", period), ("step", step), ("squeezes", squeezes)):
            check_integer(name, value, 1)
        self.max_gap = max_gap
        self.period = period
        self.step = step
        self.squeezes = squeezes
        # Live bonds by layer, while an optimizer step goes on.
        self._live = {}

    def register(self, model):
        layers = _layers(model)
        if not layers:
            raise TargetError(
                f"DimensionSqueezingCallback finds no `tensor_train` layer in this {type(model).__name__}; factorize "
                "it with method='tensor_train'."
            )
        for name, layer in layers.items():
            if isinstance(layer, LinearFace):
                raise TargetError(f"{name} carries adapters; call `merge_and_unload()` or `unload()` first.")

    def start(self, model):
        pass

    def check_schedule(self, max_steps):
        if self.period > max_steps:
            raise ConfigError(
                f"`period`={self.period} is longer than the run of {max_steps} optimizer steps; train longer, or "
                "lower it."
            )

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._live = {name: live_bonds(layer) for name, layer in _layers(model).items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Momentum goes on where there is no gradient.
        layers = _layers(model)
        for name, live in self._live.items():
            ends = (1, *live, 1)
            for k, core in enumerate(layers[name].cores):
                core[ends[k] :] = 0
                core[..., ends[k + 1] :] = 0

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if state.global_step % self.period == 0:
            self._squeeze(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        remove_buffers(model, self.prefix)
        for name, layer in _layers(model).items():
            bonds = _fillable(live_bonds(layer), layer)
            layer.set_cores(_cut(layer, bonds), bonds)
            layer.relative_error = None
            if sum(core.numel() for core in layer.cores) >= layer.out_features * layer.in_features:
                dense_kind(layer).to_dense(model, name)
        if not factorized(model):
            to_dense(model)

    @torch.no_grad()
    def _squeeze(self, model):
        layers = list(_layers(model).items())
        chosen = torch.full((self.squeezes, 2), -1, device=next(model.parameters()).device)
        gaps = sorted((gap for index, (_, layer) in enumerate(layers) for gap in self._least_gap(index, layer)))
        for place, (gap, index, bond) in enumerate(gaps[: self.squeezes]):
            if gap <= self.max_gap:
                chosen[place] = chosen.new_tensor([index, bond])
                logger.info("Bond %d of %s is lowered by %d, gap %.4g.", bond, layers[index][0], self.step, gap)
        # Decompositions differ in last bits by hardware, and with them what is the least.
        share(chosen)
        for index, bond in chosen.tolist():
            if index >= 0:
                self._lower(layers[index][1], bond)

    def _least_gap(self, index, layer):
        """`[(gap, index, bond)]` of the bond of a layer that hurts least; empty where none can be lowered."""
        live = live_bonds(layer)
        found = []
        for bond, (left, right) in enumerate(bond_cores([core.double() for core in _cut(layer, live)])):
            lowered = [*live[:bond], live[bond] - self.step, *live[bond + 1 :]]
            if lowered[bond] < 1 or _fillable(lowered, layer) != lowered:
                continue
            squares = torch.linalg.svdvals(left @ right).square()
            share = squares[lowered[bond] :].sum() / squares.sum() if squares[0] > 0 else squares.sum()
            found.append((float(share.sqrt()), index, bond))
        return [min(found)] if found else []

    def _lower(self, layer, bond):
        live = live_bonds(layer)
        cores = [core.double() for core in _cut(layer, live)]
        pair = lowered_bond(cores[bond], cores[bond + 1], bond_cores(cores)[bond], live[bond] - self.step)
        for k, made in zip((bond, bond + 1), pair, strict=True):
            core = layer.cores[k]
            core.zero_()
            core[: made.shape[0], :, :, : made.shape[3]] = made
            share(core)


def _layers(model):
    """`{name: layer}` of the tensor trains."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorTrainLinear)}


@torch.no_grad()
def live_bonds(layer):
    """What is left of each bond of a train when components at its end go that are zero on both sides; 1 at least."""
    found = []
    for left, right in zip(layer.cores[:-1], layer.cores[1:], strict=True):
        live = (left.flatten(0, 2).any(0) | right.flatten(1).any(1)).nonzero()
        found.append(int(live.max()) + 1 if len(live) else 1)
    return found


def _cut(layer, bonds):
    """The cores with the first components of each bond."""
    ends = (1, *bonds, 1)
    return [core.detach()[: ends[k], :, :, : ends[k + 1]] for k, core in enumerate(layer.cores)]


def _fillable(bonds, layer):
    """The smallest bonds, no smaller than these, that are no more than a neighbour times the core between them."""
    sizes = [i * j for i, j in zip(layer.out_shape, layer.in_shape, strict=True)]
    ends = [1, *bonds, 1]
    for k in range(1, len(ends) - 1):
        ends[k] = max(ends[k], math.ceil(ends[k - 1] / sizes[k - 1]))
    for k in range(len(ends) - 2, 0, -1):
        ends[k] = max(ends[k], math.ceil(ends[k + 1] / sizes[k]))
    return ends[1:-1]
