"""Mixed-rank fine-tuning: draw a branch for every layer and step, and compare two draws of a step."""

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checks import check_choice, check_integer, check_number
from ..draws import draw, two_branch_layers
from ..errors import ConfigError, TargetError
from ..refine.base import predicted_tokens
from ..refine.distillation import logit_loss
from ..sharding import refuse_fsdp, refuse_sharded
from ._base import refuse_waiting
from ._passes import Computed, refuse_two_passes, replaced_forward


class MixedRankCallback(TrainerCallback, ExportableState):
    r"""Draws the full-rank weight or the factors for every mixed-rank layer and step, ever less often the weight.

        p(t) = p_0 max(0, 1 - t / T),    z_i(t) ~ Bernoulli(p(t)) from seed and t alone

    All micro-batches of a step, and all processes, have the same draws. As nothing else is remembered, a run that
    goes on from a checkpoint makes the draws it would have made.

    Args:
        probability (`float`, defaults to 0.5): p_0, that of the full-rank weight in the first step, in [0, 1].
        anneal_fraction (`float`, defaults to 0.5): T as a fraction of the run's optimizer steps, in (0, 1].
        anneal_steps (`int`, *optional*): T itself instead, from 1 to the steps of the run.
        seed (`int`, defaults to 0): of the draws, 0 or more.

    Raises:
        ConfigError: a value that is not allowed; when training begins, T beyond the end of the run, fp16, whose
            gradient scaler would skip steps, DeepSpeed, or several processes that are not to look for unused
            parameters (`ddp_find_unused_parameters`).
        TargetError: when training begins, a model without mixed-rank layers, or one that DeepSpeed ZeRO-3 has split.

    Reference:
        As for [`MixedRankConfig`]; reconstructed, with the defaults ours.
    """

    def __init__(self, probability=0.5, anneal_fraction=0.5, anneal_steps=None, seed=0):
        check_number("probability", probability, 0, 1)
        check_number("anneal_fraction", anneal_fraction, 0, 1, open_low=True)
        if anneal_steps is not None:
            check_integer("anneal_steps", anneal_steps, 1)
        check_integer("seed", seed, 0)
        self.probability = probability
        self.anneal_fraction = anneal_fraction
        self.anneal_steps = anneal_steps
        self.seed = seed

    def state(self):
        """What Trainer writes into a checkpoint: the arguments, and nothing else."""
        names = ("probability", "anneal_fraction", "anneal_steps", "seed")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def probability_at(self, step, max_steps):
        """p of a step, counted from 0, in a run of `max_steps`."""
        end = self.anneal_fraction * max_steps if self.anneal_steps is None else self.anneal_steps
        return self.probability * max(0.0, 1 - step / end)

    def draw(self, model, state, turn=0):
        """Set the branches of the step that `state` stands before; `turn` 1 is a second, independent draw."""
        draw(model, self.probability_at(state.global_step, state.max_steps), self.seed, state.global_step, turn)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not two_branch_layers(model):
            raise TargetError(
                f"MixedRankCallback finds no mixed-rank layer in this {type(model).__name__}; make some by "
                "`peft.get_peft_model(model, MixedRankConfig(...))`, or leave the callback out."
            )
        if args.deepspeed_plugin is not None:
            raise ConfigError(
                "DeepSpeed steps on flattened gradients, so that momentum would move the branch that is not drawn; "
                "use DistributedDataParallel."
            )
        refuse_waiting(args, model, "the branches that are not drawn")
        refuse_fsdp(model, "mixed-rank layers")
        refuse_sharded(dict(model.named_parameters()))
        if args.fp16:
            raise ConfigError(
                "`fp16`=True of TrainingArguments scales gradients and skips the steps where they overflow, so that "
                "draws would be lost; use `bf16`=True or float32."
            )
        if self.anneal_steps is not None and self.anneal_steps > state.max_steps:
            raise ConfigError(
                f"`anneal_steps`={self.anneal_steps} exceeds the {state.max_steps} steps of the run, which would end "
                "with full-rank weights still drawn; train longer, or lower it."
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.draw(model, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for layer in two_branch_layers(model).values():
            layer.drawn = None


class MixedRankTrainer(Trainer):
    r"""A `Trainer` that makes two passes over each batch, with two draws, and wants the outputs to agree.

        (L_1 + L_2) / 2 + (weight / 2) d(y_1, y_2),
        d = KL(p_1 || p_2) + KL(p_2 || p_1), mean over tokens,   or   d = 2 mean (y_1 - y_2)^2

    L_1 and L_2 are the losses that `Trainer` would have computed. A training step costs two ordinary ones.

    Args:
        consistency_weight (`float`, defaults to 1.0): of the comparison, 0 or more; at 0 there is one pass.
        consistency (`str`, defaults to `"kl"`): `"kl"` of predicted distributions, or `"mse"` of outputs.
        *args, **kwargs: of `transformers.Trainer`; a `MixedRankCallback()` is added if `callbacks` has none.

    Raises:
        ConfigError: a value that is not allowed, gradient checkpointing (a pass would be recomputed with the draw of
            the other), several GPUs in one process, or `"kl"` of outputs with one number each.

    Reference:
        As for [`MixedRankConfig`]; reconstructed.
    """

    def __init__(self, *args, consistency_weight=1.0, consistency="kl", **kwargs):
        check_number("consistency_weight", consistency_weight, 0)
        check_choice("consistency", consistency, ("kl", "mse"))
        super().__init__(*args, **kwargs)
        self.consistency_weight = consistency_weight
        self.consistency = consistency
        if self._mixed_rank_callback() is None:
            self.add_callback(MixedRankCallback())
        if consistency_weight:
            # The comparison is a mean over a micro-batch, so that Trainer has to divide by the accumulation steps.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    def train(self, *args, **kwargs):
        if self.consistency_weight:
            refuse_two_passes(self, "MixedRankTrainer consistency_weight=0")
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        if not self.consistency_weight or not inner.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = []

        def both(forward, *args, **kwargs):
            outputs.append(forward(*args, **kwargs))
            self._mixed_rank_callback().draw(inner, self.state, turn=1)
            outputs.append(forward(*args, **kwargs))
            self._mixed_rank_callback().draw(inner, self.state)
            return tuple(outputs)

        # One call of what wraps the model for several processes: it looks for the parameters in use after each call.
        with replaced_forward(inner, both):
            passes = [Computed(inner, lambda **batch: model(**batch)[0]), Computed(inner, lambda **_: outputs[1])]
            losses = [super(MixedRankTrainer, self).compute_loss(p, dict(inputs), False, None) for p in passes]
        one, other = (output["logits"] for output in outputs)
        distance = self._distance(one, other, predicted_tokens(inner, inputs, one))
        loss = sum(losses) / 2 + self.consistency_weight / 2 * distance
        return (loss, outputs[0]) if return_outputs else loss

    def _distance(self, one, other, tokens):
        if self.consistency == "mse":
            difference = (one.float() - other.float()).square()
            return 2 * (difference if tokens is None else difference[tokens]).mean()
        if one.shape[-1] == 1:
            raise ConfigError(
                "`consistency`='kl' compares distributions, and this model puts out one number; use 'mse'."
            )
        return logit_loss(one, other, tokens) + logit_loss(other, one, tokens)

    def _mixed_rank_callback(self):
        return next((c for c in self.callback_handler.callbacks if isinstance(c, MixedRankCallback)), None)
