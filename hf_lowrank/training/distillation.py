"""End-to-end recovery: train a compressed model to behave like the one it was made from."""

from dataclasses import dataclass, fields

import torch
from transformers import Trainer

from ..checks import check_number
from ..errors import ConfigError
from ..refine.base import predicted_tokens
from ..refine.distillation import hidden_loss, logit_loss, token_contrastive_loss


@dataclass(frozen=True)
class Distillation:
    """How much each loss counts; one of weight 0 is not computed.

    Args:
        task (`float`, defaults to 0.0): the model's own loss on the labels, at least 0.
        logits (`float`, defaults to 1.0): divergence of the predicted distributions, at least 0.
        hidden (`float`, defaults to 0.0): relative error of all hidden states, at least 0.
        contrastive (`float`, defaults to 0.0): token-contrastive loss of the last hidden state, at least 0.
        temperature (`float`, defaults to 1.0): of the predicted distributions, above 0.
        contrastive_temperature (`float`, defaults to 0.1): of the similarities, above 0.

    Raises:
        ConfigError: a value out of range, or no loss at all.
    """

    task: float = 0.0
    logits: float = 1.0
    hidden: float = 0.0
    contrastive: float = 0.0
    temperature: float = 1.0
    contrastive_temperature: float = 0.1

    def __post_init__(self):
        for field in fields(self):
            is_temperature = field.name.endswith("temperature")
            check_number(field.name, getattr(self, field.name), 0, owner="Distillation", open_low=is_temperature)
        if not self.task + self.logits + self.hidden + self.contrastive > 0:
            raise ConfigError("Distillation needs a loss: give `task`, `logits`, `hidden` or `contrastive` a weight.")


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss compares the model with a teacher on the same inputs.

    Args:
        teacher (`PreTrainedModel`): the dense model; runs in eval mode without gradients, and is left as it is.
        distillation ([`Distillation`], *optional*): which losses; divergence of the predictions alone by default.
        *args, **kwargs: of `transformers.Trainer`.

    Raises:
        ConfigError: a teacher whose predictions have another size; `compute_loss_func` or `label_smoothing_factor`,
            which no loss here goes through; `task` for batches that the model computes no loss of.
    """

    def __init__(self, *args, teacher, distillation=None, **kwargs):
        super().__init__(*args, **kwargs)
        for name, given in (
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
        ):
            if given:
                raise ConfigError(
                    f"`{name}` would be ignored: the loss is that of `distillation`, with `task` times the model's "
                    "own on the labels. Leave it out."
                )
        self.distillation = Distillation() if distillation is None else distillation
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.teacher.eval()
        # The losses are means over a micro-batch, so that Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen = self.distillation
        states = bool(chosen.hidden or chosen.contrastive)
        asked = {**inputs, "output_hidden_states": True} if states else inputs
        outputs = model(**asked)
        with torch.no_grad():
            targets = self.teacher(**asked)
        if outputs["logits"].shape != targets["logits"].shape:
            raise ConfigError(
                f"`teacher` predicts {tuple(targets['logits'].shape)}, the model {tuple(outputs['logits'].shape)}; "
                "use the model that was compressed."
            )
        tokens = predicted_tokens(self.teacher, inputs, outputs["logits"])
        loss = outputs["logits"].new_zeros((), dtype=torch.float32)
        if chosen.task:
            if outputs.get("loss") is None:
                raise ConfigError(
                    f"`task`={chosen.task:g} of Distillation weighs the model's own loss, and it computes none for "
                    f"batches of {sorted(inputs)}; give `labels`, or `task`=0."
                )
            loss = loss + chosen.task * outputs["loss"].float()
        if chosen.logits:
            loss = loss + chosen.logits * logit_loss(outputs["logits"], targets["logits"], tokens, chosen.temperature)
        if states:
            one, other = (found.get("decoder_hidden_states") or found["hidden_states"] for found in (outputs, targets))
            mask = tokens if tokens is not None and tokens.shape == one[-1].shape[:-1] else None
            if chosen.hidden:
                loss = loss + chosen.hidden * hidden_loss(one, other, mask)
            if chosen.contrastive:
                loss = loss + chosen.contrastive * token_contrastive_loss(
                    one[-1], other[-1], mask, chosen.contrastive_temperature
                )
        if not return_outputs:
            return loss
        if states:
            # What the losses asked for is no prediction.
            outputs = type(outputs)(**{key: x for key, x in outputs.items() if not key.endswith("hidden_states")})
        return loss, outputs
