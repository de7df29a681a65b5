"""Ordered dropout over ranks: factors are trained so that their components come in order of importance."""

import math

import torch

from ..checks import check_boolean, check_integer, check_number
from ..draws import deal
from ..errors import ConfigError, TargetError
from ..formats import LowRankLinear
from ..linalg import balanced
from ..surgery import ALL_LAYERS, ALL_LINEAR, matches
from ._base import WeightCallback, remove_buffers, trainable_sites
from ._components import clear_from, component_layers, importance, live_rank
from ._full_rank import full_rank, refuse_stale
from ._gates import close_gates, take_gates_off
from .maestro_ranks import keep_leading


SAMPLERS = ("single_layer", "independent")


class MaestroCallback(WeightCallback):
    r"""Trains factors of full rank of which each step uses leading components only, and drops what ends up unused.

        y = left[:, :b] right[:b] x + b_0,    b from 1 to the layer's rank, drawn for the step

    What the first components cannot do is left to the next, so that a component's place becomes its importance: the
    trained model can be cut at any rank, see [`maestro_ranks`]. Every `shrink_every` steps a layer keeps b components
    while

        |left[:, b:]|_F |right[b:]|_F >= threshold;

    the others become zero and stay so. When training ends they are taken away, and a layer that is not smaller than
    dense becomes dense. Use it with [`MaestroTrainer`], whose penalty pulls the last components to zero; under a plain
    `Trainer` there is ordered dropout alone.

    A dense model gets its factors, `U sqrt(S)` and `sqrt(S) V^T`, when `Trainer` is made; layers that are `low_rank`
    already are taken as they are. All micro-batches of a step, and all processes, have the same draw. Which components
    are dropped is read off the weights, and draws depend on seed and step alone, so that a run that goes on from a
    checkpoint ends in the same bits; every checkpoint loads with plain `from_pretrained`.

    Args:
        sampler (`str`, defaults to `"single_layer"`): a step truncates one layer, and pairs of layer and rank are
            dealt without replacement; or `"independent"`: a step truncates every layer, at ranks that are dealt
            without replacement for each.
        threshold (`float`, defaults to 1e-5): of the product of norms, at least 0; it depends on the scale of weights
            and inputs. At 0 nothing is dropped.
        shrink_every (`int`, *optional*): optimizer steps, at least 1 and at most those of the run; by default those of
            an epoch, rounded up.
        final_prune (`bool`, defaults to `True`): whether layers are made smaller when training ends; `False` keeps all
            components, to cut one trained model at many sizes.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): which layers of a dense model, as in
            [`LowRankConfig`]; experts of a mixture stay as they are.
        exclude_modules (`str` or `list[str]`, *optional*): which not, by the same rule.
        seed (`int`, defaults to 0): of the draws, 0 or more.

    Raises:
        ConfigError: a value that is not allowed; when `Trainer` is made or training begins, `shrink_every` beyond the
            end of the run, none for data without a length, fp16, DeepSpeed, several GPUs in one process, or an
            optimizer that was made before the factors.
        TargetError: no layer to work on, one that is frozen or carries adapters, or weights that are split over
            processes.

    Reference:
        Maestro, 2308.14929, ICML 2024. Differs: ranks are integers from 1 on, so that none is skipped by rounding; a
        draw holds for an optimizer step rather than for a forward pass; after shrinking, only ranks that are left are
        dealt. That dealing begins anew with every shrinking is reconstructed.
    """

    prefix = "maestro"

    def __init__(
        self,
        sampler="single_layer",
        threshold=1e-5,
        shrink_every=None,
        final_prune=True,
        target_modules="all-linear",
        exclude_modules=None,
        seed=0,
    ):
        if sampler not in SAMPLERS:
            raise ConfigError(f"`sampler`={sampler!r} of MaestroCallback must be one of {list(SAMPLERS)}.")
        check_number("threshold", threshold, 0)
        if shrink_every is not None:
            check_integer("shrink_every", shrink_every, 1)
        check_boolean("final_prune", final_prune)
        check_integer("seed", seed, 0)
        self.sampler = sampler
        self.threshold = threshold
        self.shrink_every = shrink_every
        self.final_prune = final_prune
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.seed = seed
        # Components that are not zero for good, by layer; found in the weights when a run begins or goes on.
        self._kept = {}
        # Optimizer steps, where `shrink_every` is not given; known when a run begins.
        self._epoch = None

    def register(self, model):
        layers = component_layers(model)
        if layers:
            apart = [name for name in layers if not self._targets(name)]
            if apart:
                raise TargetError(
                    f"{apart[0]} is `low_rank` already, which MaestroCallback takes as it is, and `target_modules`="
                    f"{self.target_modules!r} with `exclude_modules`={self.exclude_modules!r} leaves it out; leave "
                    "both unset for a factorized model, or call hf_lowrank.to_dense(model) first."
                )
            return
        full_rank(model, trainable_sites(model, self.target_modules, self.exclude_modules), LowRankLinear.name)
        with torch.no_grad():
            for layer in component_layers(model).values():
                left, right = balanced(*layer.factors())
                layer.left.weight.copy_(left)
                layer.right.weight.copy_(right)

    def _targets(self, name):
        wanted = self.target_modules in (ALL_LINEAR, ALL_LAYERS) or matches(self.target_modules, name)
        return wanted and not (self.exclude_modules is not None and matches(self.exclude_modules, name))

    def start(self, model):
        pass

    def check_schedule(self, max_steps):
        if self.shrink_every is not None and self.shrink_every > max_steps:
            raise ConfigError(
                f"`shrink_every`={self.shrink_every} exceeds the {max_steps} steps of the run, so that nothing would "
                "shrink; train longer, lower it, or say so by threshold=0."
            )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        layers = component_layers(model)
        if not layers:
            raise TargetError(
                f"MaestroCallback finds no `low_rank` layer in this {type(model).__name__}; it makes some when "
                "Trainer is made, which has to be given `model`, not `model_init`, and this callback among its "
                "`callbacks`."
            )
        for name, layer in layers.items():
            if not (layer.left.weight.requires_grad and layer.right.weight.requires_grad):
                raise TargetError(f"The factors of {name} are frozen; train them (`requires_grad_(True)`).")
        refuse_stale(optimizer, model)
        if args.n_gpu > 1:
            raise ConfigError(
                f"One process drives {args.n_gpu} GPUs, whose copies of the model know nothing of the draw; start one "
                "process a GPU with `torchrun` or `accelerate launch`."
            )
        if self.shrink_every is None and self.threshold:
            try:
                batches = len(train_dataloader)
            except TypeError as error:
                raise ConfigError(
                    "`shrink_every`=None stands for the steps of an epoch, and data without a length has no epochs; "
                    "give it in optimizer steps."
                ) from error
            self._epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self._kept = {name: live_rank(layer) for name, layer in layers.items()}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.draw(model, state)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Momentum and decay go on where there is no gradient.
        self._clear(component_layers(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if self.threshold and state.global_step % self._period == 0:
            layers = component_layers(model)
            for name, layer in layers.items():
                left = int((importance(layer) >= self.threshold).sum())
                self._kept[name] = max(1, min(self._kept[name], left))
            self._clear(layers)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        layers = component_layers(model)
        take_gates_off(layers)
        remove_buffers(model, self.prefix)
        if self.final_prune:
            keep_leading(model, {name: live_rank(layer) for name, layer in layers.items()})

    def draw(self, model, state):
        """Truncate layers for the step that `state` stands before."""
        close_gates(component_layers(model), self.drawn(state))

    def drawn(self, state):
        """`{layer: rank}` of the layers that are truncated in the step that `state` stands before."""
        # Ranks that are left, and so the deal, are the same until the next shrinking.
        deals, turn = divmod(state.global_step, self._period) if self.threshold else (0, state.global_step)
        if self.sampler == "independent":
            return {
                name: 1 + deal(kept, turn, self.seed, deals, index)
                for index, (name, kept) in enumerate(self._kept.items())
            }
        number = deal(sum(self._kept.values()), turn, self.seed, deals)
        for name, kept in self._kept.items():
            if number < kept:
                return {name: 1 + number}
            number -= kept

    @property
    def _period(self):
        return self.shrink_every or self._epoch

    @torch.no_grad()
    def _clear(self, layers):
        for name, layer in layers.items():
            if self._kept[name] < layer.rank:
                clear_from(layer, self._kept[name])
