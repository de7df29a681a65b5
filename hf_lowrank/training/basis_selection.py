"""Basis selection: tune the singular values of a model on one application, drop the small ones, add bases."""

import torch

from ..checks import check_integer, check_number
from ..errors import ConfigError, TargetError
from ..formats import LowRankLinear, WeightedBasesLinear, check_rank
from ..integrations import to_dense
from ..kinds import dense_kind
from ..surgery import factorized, matches
from ..truncate import truncate
from ._base import WeightCallback, add_buffer, remove_buffers, trainable_sites
from ._full_rank import full_rank, refuse_stale


IMPORTANCES = ("magnitude", "taylor2")


class BasisSelectionCallback(WeightCallback):
    r"""Fits a model to one application with fewer and fewer bases of each weight, and a few that are new.

        W = U diag(w^2) V^T + added_left added_right,    W_0 = U diag(sigma) V^T,    w = sqrt(sigma) at the start

    U and V stay as they are; w and the added bases are trained, and nothing else but `modules_to_save`. After a part
    of the run, `pruning_steps` events at equal distances keep, in each layer, the smallest set of bases whose
    importance sums up to `keep_mass^(1 / pruning_steps)` of that of all that are left; w of the others becomes zero
    and stays so. The rest of the run makes up for it. When training ends, layers become two factors (`low_rank`),
    without the bases that are out and with their biases; a layer that is not smaller than dense becomes dense. What
    asked for gradients before does so again.

    A dense model gets its bases when `Trainer` is made. They are the format `weighted_bases`, so that every checkpoint
    of the run loads with plain `from_pretrained`. Which bases are out is read off w, and importance is kept in
    buffers: a run that goes on from a checkpoint ends in the same bits.

    Args:
        keep_mass (`float`, defaults to 0.5): product of the shares that are kept, in (0, 1]; 1 prunes nothing.
        extra_rank (`int`, defaults to 32): bases that are added to each layer, from 0 to the smaller side of each.
        pruning_steps (`int`, defaults to 50): events, at least 1 and at most the optimizer steps of their part.
        warmup_fraction (`float`, defaults to 0.25): part of the run before pruning, in [0, 1).
        pruning_fraction (`float`, defaults to 0.5): part of the run with the events, above 0; with the warm-up, 1 at
            most.
        importance (`str`, defaults to `"magnitude"`): w^2; or `"taylor2"`: what the loss would rise without the basis,
            `|sum_t (-g_t w_t + (g_t w_t)^2 / 2)|` over the steps since the last event, g the gradient of w.
        floor (`float`, defaults to 1e-3): singular values up to this part of their mean are left out from the start,
            in [0, 1].
        rank_multiple (`int`, defaults to 16): ranks are rounded up to it at the end.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): as in [`LowRankConfig`]; experts of a
            mixture stay as they are.
        exclude_modules (`str` or `list[str]`, *optional*): which not, by the same rule.
        modules_to_save (`str` or `list[str]`, *optional*): what is trained besides, such as a new classifier, by the
            same rule.
        seed (`int`, defaults to 0): of the added bases, 0 or more.

    Raises:
        ConfigError: a value that is not allowed; when `Trainer` is made or training begins, more events than steps,
            fp16, DeepSpeed, or an optimizer that was made before the bases.
        TargetError: nothing to work on, or weights that are split over processes.
        RankError: `extra_rank` beyond a weight's smaller side.

    Reference:
        Basel, 2405.15877, TMLR 2025. It warms up for one epoch of three, has 50 to 100 events, and then tunes the
        factors; a plain `Trainer` does that. Differs: biases are kept, and the output head is left alone. That each
        event keeps the same share is inferred; `"taylor2"` is reconstructed.
    """

    prefix = "basis_selection"
    replaces = True

    def __init__(
        self,
        keep_mass=0.5,
        extra_rank=32,
        pruning_steps=50,
        warmup_fraction=0.25,
        pruning_fraction=0.5,
        importance="magnitude",
        floor=1e-3,
        rank_multiple=16,
        target_modules="all-linear",
        exclude_modules=None,
        modules_to_save=None,
        seed=0,
    ):
        check_number("keep_mass", keep_mass, 0, 1, open_low=True)
        check_number("warmup_fraction", warmup_fraction, 0, 1)
        check_number("pruning_fraction", pruning_fraction, 0, 1, open_low=True)
        check_number("floor", floor, 0, 1)
        for name, value, least in (
            ("extra_rank", extra_rank, 0),
            ("pruning_steps", pruning_steps, 1),
            ("rank_multiple", rank_multiple, 1),
            ("seed", seed, 0),
        ):
            check_integer(name, value, least)
        if importance not in IMPORTANCES:
            raise ConfigError(f"`importance`={importance!r} must be one of {list(IMPORTANCES)}.")
        if warmup_fraction + pruning_fraction > 1:
            raise ConfigError(
                f"`warmup_fraction`={warmup_fraction!r} and `pruning_fraction`={pruning_fraction!r} are more than the "
                "run together; lower one."
            )
        self.keep_mass = keep_mass
        self.extra_rank = extra_rank
        self.pruning_steps = pruning_steps
        self.warmup_fraction = warmup_fraction
        self.pruning_fraction = pruning_fraction
        self.importance = importance
        self.floor = floor
        self.rank_multiple = rank_multiple
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.modules_to_save = modules_to_save
        self.seed = seed
        # Bases that are out, by layer, while an optimizer step goes on.
        self._out = {}

    def register(self, model):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if not _layers(model):
            sites = trainable_sites(model, self.target_modules, self.exclude_modules)
            for site in sites if self.extra_rank else ():
                check_rank(self.extra_rank, site.out_features, site.in_features, f"the bases added to {site.name}")
            full_rank(model, sites, WeightedBasesLinear.name, self.floor)
            generator = torch.Generator().manual_seed(self.seed)
            for layer in _layers(model).values():
                if self.extra_rank:
                    layer.add_bases(self.extra_rank, generator)
        # A layer asks for gradients again if its weight did.
        made = tuple(f"{name}." for name in _layers(model) if f"{name}.weight" in trained)
        again = [name in trained or name.startswith(made) for name, _ in model.named_parameters()]
        add_buffer(model, model, f"{self.prefix}_trained", torch.tensor(again))
        self._train_only_what_is_tuned(model)
        if self.importance == "taylor2":
            for layer in _layers(model).values():
                scores = torch.zeros_like(layer.scale, dtype=torch.float32, requires_grad=False)
                add_buffer(model, layer, f"{self.prefix}_importance", scores)

    def _train_only_what_is_tuned(self, model):
        model.requires_grad_(False)
        saved = self.modules_to_save
        if saved is not None:
            found = [module for name, module in model.named_modules() if name and matches(saved, name)]
            if not found:
                raise TargetError(f"`modules_to_save`={saved!r} matches no module of this {type(model).__name__}.")
            for module in found:
                module.requires_grad_(True)
        for layer in _layers(model).values():
            layer.scale.requires_grad_(True)
            for child in (layer.added_left, layer.added_right):
                if child is not None:
                    child.requires_grad_(True)

    def start(self, model):
        for layer in _layers(model).values():
            if self.importance == "taylor2":
                self._scores(layer).zero_()

    def check_schedule(self, max_steps):
        span = int(self.pruning_fraction * max_steps)
        if self.pruning_steps > span:
            raise ConfigError(
                f"`pruning_steps`={self.pruning_steps} exceeds the {span} optimizer steps that `pruning_fraction`="
                f"{self.pruning_fraction!r} has in a run of {max_steps}; train longer, or lower it."
            )

    def pruning_at(self, max_steps):
        """The steps, counted from 1, after which bases go in a run of `max_steps`."""
        first, span = int(self.warmup_fraction * max_steps), int(self.pruning_fraction * max_steps)
        return [first + event * span // self.pruning_steps for event in range(1, self.pruning_steps + 1)]

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not _layers(model):
            raise TargetError(
                f"BasisSelectionCallback finds no layer with bases in this {type(model).__name__}; it makes some when "
                "Trainer is made, which has to be given `model`, not `model_init`, and this callback among its "
                "`callbacks`."
            )
        refuse_stale(optimizer, model)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = _layers(model)
        self._out = {name: layer.scale == 0 for name, layer in layers.items()}
        if self.importance == "taylor2":
            # Without a gradient, the loss does not depend on the layer in this step.
            for layer in (layer for layer in layers.values() if layer.scale.grad is not None):
                change = layer.scale.grad.float() * layer.scale.float()
                self._scores(layer).add_(change.square() / 2 - change)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Momentum goes on where there is no gradient.
        for name, layer in _layers(model).items():
            layer.scale[self._out[name]] = 0

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if self.keep_mass < 1 and state.global_step in self.pruning_at(state.max_steps):
            for layer in _layers(model).values():
                self._prune(layer)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        again = model.get_buffer(f"{self.prefix}_trained").tolist()
        trained = {name for (name, _), flag in zip(model.named_parameters(), again, strict=True) if flag}
        remove_buffers(model, self.prefix)
        ranks, layers = {}, _layers(model)
        for name, layer in layers.items():
            count = layer.factors()[0].shape[1]
            rank = -(-count // self.rank_multiple) * self.rank_multiple
            if rank >= LowRankLinear.break_even(layer.out_features, layer.in_features):
                dense_kind(layer).to_dense(model, name)
            else:
                ranks[name] = rank
        if factorized(model):
            # Of two entries that match, the last counts.
            pattern = dict(sorted(ranks.items(), key=lambda entry: entry[0].count(".")))
            truncate(model, rank_pattern=pattern, format=LowRankLinear.name)
        else:
            to_dense(model)
        made = tuple(f"{name}." for name in layers if any(own.startswith(f"{name}.") for own in trained))
        for name, p in model.named_parameters():
            if name in trained or name.startswith(made):
                p.requires_grad_(True)

    def _prune(self, layer):
        if self.importance == "taylor2":
            scores = self._scores(layer).double().abs() * (layer.scale != 0)
            self._scores(layer).zero_()
        else:
            scores = layer.scale.double().square()
        if not scores.any():
            return
        order = scores.argsort(descending=True, stable=True)
        mass = scores[order].cumsum(0)
        count = 1 + int((mass < self.keep_mass ** (1 / self.pruning_steps) * mass[-1]).sum())
        layer.scale[order[count:]] = 0

    def _scores(self, layer):
        return layer.get_buffer(f"{self.prefix}_importance")


def _layers(model):
    """`{name: layer}` of the layers with weighted bases."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightedBasesLinear)}
