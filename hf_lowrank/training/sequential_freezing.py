"""Sequential freezing: one of the two factors of every layer rests while the other is trained."""

import inspect
import sys

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checks import check_integer
from ..errors import ConfigError, TargetError
from ..sharding import refuse_fsdp, refuse_sharded
from ._base import refuse_arguments, refuse_waiting
from ._components import component_layers


class SequentialFreezingCallback(TrainerCallback, ExportableState):
    r"""Trains the left and the right factors in turn, which saves the gradients of the others.

        turn t even: `left` rests and `right` is trained; t odd: the other way round
        t = epochs begun before the step, or steps made before it // `period`

    What rests needs no gradient, so that a step does a third less work in the backward pass of these layers. It keeps
    its bits, whatever the optimizer does with momentum and weight decay, and its state in the optimizer. Biases are
    always trained. Nothing but the number of the step decides, so that a run that goes on from a checkpoint ends in
    the same bits; in the end, everything is trainable as before.

    Args:
        period (`int`, *optional*): optimizer steps a turn, at least 1 and less than those of the run; by default a
            turn is an epoch.

    Raises:
        ConfigError: a value that is not allowed; when training begins, a period as long as the run, none for data
            without a length, fp16, DeepSpeed, or several processes that are not to look for unused parameters
            (`ddp_find_unused_parameters`).
        TargetError: when training begins, no layer with two factors that are both trained, or weights that are split
            over processes.

    Reference:
        2407.20266, from memory: it freezes one factor in even epochs, the other in odd ones.
    """

    # What `refuse_arguments` asks for: DeepSpeed has copies of what is switched off here.
    writes = True

    def __init__(self, period=None):
        if period is not None:
            check_integer("period", period, 1)
        self.period = period

    def state(self):
        """What Trainer writes into a checkpoint: the arguments, and nothing else."""
        names = inspect.signature(type(self)).parameters
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def resting(self, state):
        """`"left"` or `"right"`: the factor that rests in the step that `state` stands before."""
        turn = int(state.epoch or 0) if self.period is None else state.global_step // self.period
        return ("left", "right")[turn % 2]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        refuse_arguments(args, type(self))
        refuse_fsdp(model, "resting factors")
        refuse_sharded(dict(model.named_parameters()), "resting factors")
        layers = component_layers(model)
        if not layers:
            raise TargetError(
                f"SequentialFreezingCallback finds no `low_rank` layer in this {type(model).__name__}; factorize it "
                "with format='low_rank', or leave the callback out."
            )
        for name, layer in layers.items():
            if not (layer.left.weight.requires_grad and layer.right.weight.requires_grad):
                raise TargetError(
                    f"A factor of {name} is frozen, perhaps by a run that was broken off; train both "
                    "(`requires_grad_(True)`)."
                )
        steps, epochs = state.max_steps, state.num_train_epochs
        if self.period is None and epochs == sys.maxsize:
            raise ConfigError(
                "`period`=None makes an epoch a turn, and a data set without a length has no epochs; give `period` in "
                "optimizer steps."
            )
        if epochs < 2 if self.period is None else self.period >= steps:
            raise ConfigError(
                f"`period`={self.period} leaves no second turn in a run of {steps} steps and {epochs} epochs; train "
                "longer, or lower it."
            )
        refuse_waiting(args, model, "the factors that rest")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        resting = self.resting(state)
        for layer in component_layers(model).values():
            for side in ("left", "right"):
                weight = getattr(layer, side).weight
                weight.requires_grad_(side != resting)
                if side == resting:
                    # Without a gradient, an optimizer passes it over.
                    weight.grad = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for layer in component_layers(model).values():
            layer.left.weight.requires_grad_(True)
            layer.right.weight.requires_grad_(True)
