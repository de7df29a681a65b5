"""Prune while training: which weights stay is decided by gradients, and decided anew at every step."""

import torch

from ..checks import check_boolean, check_choice, check_integer, check_number
from ..errors import ConfigError, TargetError
from ..linalg import largest
from ..statistics import Statistics
from ..surgery import all_sites
from ._base import WeightCallback, add_site_buffer, remove_buffers, site_buffer, trainable_sites


SCORES = ("movement", "taylor", "magnitude")
SCOPES = ("local", "global")


class FirstOrderPruningCallback(WeightCallback):
    r"""Prunes weights by their first-order scores, ever more of them, while `Trainer` trains the model.

        y = x (W * M)^T + b,    dW = d loss / d(W * M)    (straight through the mask),
        M = the v(t) n largest scores of n,    v(t) = v_f + (v_i - v_f) (1 - (t - t_i) / (t_f - t_i))^3,
        movement: S += -W * dW,    taylor: S = decay S + (1 - decay) |W * dW|,    magnitude: S = |W|

    M is made after every step; the first one sees all weights. v is v_i up to the end of the warm-up t_i, and v_f
    from the beginning of the cool-down t_f on, in which weights may still take the place of others. Gradients are
    those that the optimizer gets: summed over micro-batches, averaged over processes, clipped. Weights that are
    masked go on being trained, so that they can come back.

    Between the optimizer's steps the parameters hold W * M: that is what the forward and backward passes, evaluation
    and checkpoints see, without any module being replaced or wrapped. A buffer holds W, which takes the parameter's
    place for the optimizer's step. A checkpoint within the run therefore loads as the pruned model that was evaluated,
    with a warning that it holds more; a finished model is an ordinary dense one with zeros.

    Args:
        score (`str`, defaults to `"movement"`): `"movement"`, `"taylor"`, or `"magnitude"` as the baseline that does
            not look at gradients. The paper's claim, that zeros form low-rank patterns, depends on it; see
            [`rank_profile`].
        keep_fraction (`float`, defaults to 0.25): v_f, the weights that are kept in the end, in (0, 1].
        initial_keep_fraction (`float`, defaults to 1.0): v_i, in [`keep_fraction`, 1].
        warmup_fraction (`float`, defaults to 0.1): t_i as a part of the run, in [0, 1].
        cooldown_fraction (`float`, defaults to 0.3): what follows t_f, as a part of the run, in [0, 1].
        warmup_steps (`int`, *optional*): t_i in optimizer steps instead.
        cooldown_steps (`int`, *optional*): what follows t_f, likewise.
        scope (`str`, defaults to `"local"`): `"local"` keeps the same fraction of every matrix, `"global"` compares
            all of them.
        decay (`float`, defaults to 0.9): of the mean that `"taylor"` takes, in [0, 1).
        keep_scores (`bool`, defaults to `False`): whether [`FirstOrderPruningCallback.statistics`] can be asked after
            the run; the scores are in no checkpoint.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): as in [`LowRankConfig`].
        exclude_modules (`str` or `list[str]`, *optional*): likewise.

    Raises:
        ConfigError: a value that is not allowed; before the first step, a schedule longer than the run, fp16,
            DeepSpeed, or `load_best_model_at_end`.
        TargetError: when `Trainer` is made, a pattern that matches nothing or a frozen weight; before the first step,
            weights that are split over processes.
        CheckpointError: before the first step, a checkpoint without the state of this callback.

    Reference:
        Movement pruning, Sanh et al., NeurIPS 2020, https://arxiv.org/abs/2005.07683, as the first stage of LPAF,
        LREC-COLING 2024, https://arxiv.org/abs/2306.14152. Reconstructed: there is no public code of LPAF; that it
        scores by movement is from memory, and the defaults, `"taylor"` and `"global"` are ours.
    """

    prefix = "first_order_pruning"

    def __init__(
        self,
        score="movement",
        keep_fraction=0.25,
        initial_keep_fraction=1.0,
        warmup_fraction=0.1,
        cooldown_fraction=0.3,
        warmup_steps=None,
        cooldown_steps=None,
        scope="local",
        decay=0.9,
        keep_scores=False,
        target_modules="all-linear",
        exclude_modules=None,
    ):
        check_choice("score", score, SCORES)
        check_choice("scope", scope, SCOPES)
        check_number("keep_fraction", keep_fraction, 0, 1, open_low=True)
        check_number("initial_keep_fraction", initial_keep_fraction, keep_fraction, 1)
        check_number("warmup_fraction", warmup_fraction, 0, 1)
        check_number("cooldown_fraction", cooldown_fraction, 0, 1)
        check_number("decay", decay, 0, 1)
        if decay == 1:
            raise ConfigError("`decay`=1 would never look at a gradient; it must be below 1.")
        for name, value in (("warmup_steps", warmup_steps), ("cooldown_steps", cooldown_steps)):
            if value is not None:
                check_integer(name, value, 0)
        check_boolean("keep_scores", keep_scores)
        self.score = score
        self.keep_fraction = keep_fraction
        self.initial_keep_fraction = initial_keep_fraction
        self.warmup_fraction = warmup_fraction
        self.cooldown_fraction = cooldown_fraction
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.scope = scope
        self.decay = decay
        self.keep_scores = keep_scores
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules

    def schedule(self, max_steps):
        """`(t_i, t_f)` in a run of `max_steps` optimizer steps."""
        warmup = int(self.warmup_fraction * max_steps) if self.warmup_steps is None else self.warmup_steps
        cooldown = int(self.cooldown_fraction * max_steps) if self.cooldown_steps is None else self.cooldown_steps
        return warmup, max_steps - cooldown

    def keep_at(self, step, max_steps):
        """v after `step` optimizer steps of `max_steps`."""
        begin, end = self.schedule(max_steps)
        rest = 1 - min(max((step - begin) / (end - begin), 0.0), 1.0)
        return self.keep_fraction + (self.initial_keep_fraction - self.keep_fraction) * rest**3

    def check_schedule(self, max_steps):
        begin, end = self.schedule(max_steps)
        if begin >= end:
            raise ConfigError(
                f"The warm-up of {begin} steps and the cool-down of {max_steps - end} leave none of the {max_steps} "
                "steps of the run to prune in; train longer, or lower `warmup_steps`, `cooldown_steps` or the "
                "fractions."
            )

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end:
            raise ConfigError(
                "`load_best_model_at_end`=True would bring a model of before the end of pruning back; leave it out."
            )
        super().on_init_end(args, state, control, model=model, **kwargs)

    def register(self, model):
        for site in trainable_sites(model, self.target_modules, self.exclude_modules):
            weight = model.get_parameter(site.weight_name).detach()
            self._add(model, site, "dense", torch.zeros_like(weight))
            self._add(model, site, "mask", torch.ones_like(weight, dtype=torch.bool))
            if self.score != "magnitude":
                # Sums of products; half precision would lose the small ones.
                self._add(model, site, "score", torch.zeros_like(weight, dtype=torch.float32))

    @torch.no_grad()
    def start(self, model):
        for site in self._sites(model):
            # Not earlier: what begins a run in several processes is what the first of them has.
            self._get(model, site, "dense").copy_(model.get_parameter(site.weight_name))
            self._get(model, site, "mask").fill_(True)
            if self.score != "magnitude":
                self._get(model, site, "score").zero_()

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        sites = self._sites(model)
        weights = {site: model.get_parameter(site.weight_name) for site in sites}
        if all(weight.grad is None for weight in weights.values()):
            raise TargetError(
                "No targeted weight has a gradient where the optimizer is about to step; use an optimizer that leaves "
                "gradients in the parameters, and a loss that depends on them."
            )
        for site, weight in weights.items():
            weight.copy_(self._get(model, site, "dense"))
            if weight.grad is None or self.score == "magnitude":
                continue
            product = weight.float() * weight.grad.float()
            score = self._get(model, site, "score")
            if self.score == "movement":
                score.sub_(product)
            else:
                score.lerp_(product.abs_(), 1 - self.decay)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        sites = self._sites(model)
        for site in sites:
            self._get(model, site, "dense").copy_(model.get_parameter(site.weight_name))
        keep = self.keep_at(state.global_step + 1, state.max_steps)
        scores = [self._scores(model, site) for site in sites]
        masks = []
        for together in [scores] if self.scope == "global" else [[score] for score in scores]:
            masks += largest(together, keep, "The score of a weight, and so its gradient,")
        for site, mask in zip(sites, masks, strict=True):
            self._get(model, site, "mask").copy_(mask)
            model.get_parameter(site.weight_name).masked_fill_(~mask, 0)

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        importance = {}
        for site in self._sites(model) if self.keep_scores else ():
            kept = self._scores(model, site).double().clamp(min=0) * self._get(model, site, "mask")
            kept = site.kind.oriented(model, site, kept)
            importance[site] = {"importance_columns": kept.sum((0, 1)), "importance_rows": kept.sum((0, 2))}
        remove_buffers(model, self.prefix)
        for site, sums in importance.items():
            for name, tensor in sums.items():
                self._add(model, site, name, tensor, persistent=False)

    @torch.no_grad()
    def statistics(self, model):
        r"""What `method="lpaf"` wants to know of a model that was pruned with `keep_scores=True`.

            importance_columns_j = sum_i M_ij max(S_ij, 0),    importance_rows_i = sum_j M_ij max(S_ij, 0)

        Args:
            model (`torch.nn.Module`): as `Trainer` left it.

        Returns:
            [`Statistics`]

        Raises:
            ConfigError: there are no scores in it.
        """
        tensors = {}
        for site in all_sites(model):
            found = {name: self._get(model, site, name) for name in ("importance_columns", "importance_rows")}
            if all(tensor is not None for tensor in found.values()):
                tensors[site.name] = {name: tensor.cpu() for name, tensor in found.items()}
        if not tensors:
            raise ConfigError(
                f"There are no scores in this {type(model).__name__}; prune it in a Trainer with keep_scores=True "
                "first, and ask the model that the Trainer has, before it is factorized."
            )
        provenance = {"data": "pruning", "score": self.score, "keep_fraction": self.keep_fraction, "tokens": 0}
        return Statistics({name: name for name in tensors}, tensors, provenance)

    def _sites(self, model):
        return [site for site in all_sites(model) if self._get(model, site, "dense") is not None]

    def _scores(self, model, site):
        if self.score == "magnitude":
            return self._get(model, site, "dense").abs()
        return self._get(model, site, "score")

    def _get(self, model, site, name):
        return site_buffer(model, site, self.prefix, name)

    def _add(self, model, site, name, tensor, persistent=True):
        add_site_buffer(model, site, self.prefix, name, tensor, persistent)
