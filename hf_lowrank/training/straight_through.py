"""Train a dense model through its factorized weights, and end with them."""

import torch

from ..checks import check_integer, check_number
from ..errors import ConfigError, TargetError
from ..formats import FORMATS
from ..integrations import LowRankConfig
from ..integrations.planning import Gathered, informed_plan
from ..integrations.verbs import describe, refuse_quantized
from ..kinds import succeed
from ._base import WeightCallback, add_buffer, refuse_waiting, remove_buffers, share, trainable_sites
from ._full_rank import refuse_stale
from ._straight_through import StraightThroughLinear, finish, refresh, straight_through_layers


class StraightThroughFactorizerCallback(WeightCallback):
    r"""Trains dense weights W that are used as F(W) only, so that they grow into what the format can hold.

        forward x F(W)^T,    backward dL/dW := dL/dF(W),    F(W) computed anew every `refresh_every` steps;
        in the last `tune_fraction` of the run: F(W) a last time, then its numbers are trained, and its places fixed

    F is any method that needs no data and takes weights one at a time: `dsformer`, for which it was proposed,
    `sparse_low_rank`, `svd`. When training ends the factors stand in the model, which saves and loads as any
    factorized one. Training takes the memory of a dense model, and that of the factors beside it.

    Args:
        config ([`LowRankConfig`] or `dict`, *optional*): method, budget and targets; by default `method="dsformer"` at
            its default budget.
        refresh_every (`int`, defaults to 10): optimizer steps between two computations of F(W), at least 1. Each costs
            a factorization of the whole model; in between, W moves and F(W) does not follow, so that more steps want a
            lower learning rate.
        tune_fraction (`float`, defaults to 0.2): of the run's steps, at the end of it, in [0, 1).

    Raises:
        ConfigError: an option that is not allowed; when training begins, a first refresh that would come after the
            last one, fp16, whose gradient scaler would skip steps, an optimizer that was made before the factors, or
            several processes that are not to look for unused parameters (`ddp_find_unused_parameters`).
        TargetError: targets that match nothing, are frozen, or are split over processes.

    Reference:
        The Straight-Through Factorizer of DSFormer, 2312.13211, of which the abstract is known. Reconstructed:
        when F(W) is computed, that its places are fixed for a last phase, and all defaults.
    """

    prefix = "stf"
    replaces = True

    def __init__(self, config=None, refresh_every=10, tune_fraction=0.2):
        if config is None:
            config = LowRankConfig(method="dsformer")
        self.recipe = config if isinstance(config, LowRankConfig) else LowRankConfig.from_dict(dict(config))
        method = self.recipe.method
        alone = not (method.statistics or method.joint_groups or method.share_layers > 1 or method.initialises)
        if not alone or self.recipe.needs_probe or self.recipe.refine is not None:
            raise ConfigError(
                f"`config` of StraightThroughFactorizerCallback has method={method.name!r} with options that need "
                "calibration data, share factors or replace weights; take one that approximates a weight by itself, "
                "such as 'dsformer', 'sparse_low_rank' or 'svd', without `refine` and without an allocation that "
                "probes the model."
            )
        check_integer("refresh_every", refresh_every, 1)
        check_number("tune_fraction", tune_fraction, 0, 1)
        if tune_fraction == 1:
            raise ConfigError("`tune_fraction`=1 leaves no step for the dense weights; give less, such as 0.2.")
        self.config = self.recipe.to_json()
        self.refresh_every = refresh_every
        self.tune_fraction = tune_fraction

    def tunes_from(self, max_steps):
        """The step, counted from 0, from which the factors themselves are trained; `max_steps` if none is."""
        return max_steps - round(self.tune_fraction * max_steps)

    def check_schedule(self, max_steps):
        if self.refresh_every >= self.tunes_from(max_steps):
            raise ConfigError(
                f"`refresh_every`={self.refresh_every} never comes in the {self.tunes_from(max_steps)} steps that the "
                f"dense weights are trained, of {max_steps}; lower it, or train longer."
            )

    @torch.no_grad()
    def register(self, model):
        refuse_quantized(model)
        recipe = self.recipe
        trainable_sites(model, recipe.target_modules, recipe.exclude_modules)
        plan = informed_plan(model, recipe, Gathered())
        if not plan.sites:
            raise TargetError(
                "At the budget of `config` no targeted layer becomes smaller, so that none is trained; lower it, or "
                "`rank_multiple`."
            )
        specs = plan.specs()
        for site in plan.sites.values():
            if not site.kind.single:
                raise TargetError(
                    f"`target_modules` names {site.name}, several weights in one module, which cannot be trained so; "
                    "leave it out with `exclude_modules`."
                )
            layer = StraightThroughLinear(model.get_submodule(site.name), site, _empty(site, specs[site.name], model))
            refresh(layer, recipe.method)
            succeed(model, site.name, layer)
            add_buffer(model, layer, "stf_refreshed", torch.zeros((), dtype=torch.int64))

    def start(self, model):
        self._refresh(model, 0)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        refuse_waiting(args, model, "the factors, and then of the dense weights")
        super().on_train_begin(args, state, control, model=model, **kwargs)
        refuse_stale(optimizer, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step, last = state.global_step, self.tunes_from(state.max_steps)
        if step == last or (0 < step < last and step % self.refresh_every == 0):
            self._refresh(model, step)
        for layer in straight_through_layers(model).values():
            layer.tuning = step >= last

    def on_train_end(self, args, state, control, model=None, **kwargs):
        layers = straight_through_layers(model)
        if not all(layer.tuning for layer in layers.values()):
            self._refresh(model, state.global_step)
        for name, layer in layers.items():
            finish(model, name, layer)
        remove_buffers(model, self.prefix)
        describe(model, self.recipe.again(), None)

    def _refresh(self, model, step):
        for layer in straight_through_layers(model).values():
            refresh(layer, self.recipe.method)
            for tensor in layer.factorized.state_dict().values():
                share(tensor)
            layer.stf_refreshed.fill_(step)


def _empty(site, spec, model):
    """The layer that will hold F(W), on the device of W; its bias stays where it is."""
    weight = model.get_parameter(site.weight_name)
    options = {"transposed": site.kind.transposed, "device": weight.device, "dtype": weight.dtype}
    return FORMATS[spec["format"]].from_spec(spec, site.in_features, site.out_features, False, **options)
