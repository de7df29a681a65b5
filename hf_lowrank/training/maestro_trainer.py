"""The loss of ordered dropout: a group lasso over what follows each component, perhaps a pass of full rank."""

from transformers import Trainer

from ..checks import check_boolean, check_number
from ..errors import ConfigError
from ..refine.base import predicted_tokens
from ..refine.distillation import logit_loss
from ._components import component_layers, tails
from ._gates import open_gates
from ._passes import Computed, refuse_two_passes, replaced_forward
from .maestro import MaestroCallback


class MaestroTrainer(Trainer):
    r"""A `Trainer` whose loss pulls components to zero, the last of a layer first; perhaps with a pass of full rank.

        loss(truncated) + lasso_weight sum_layers sum_b (|left[:, b:]|_F + |right[b:]|_F),    b = 0 .. r - 1

    With `full_pass` a step makes two passes, and the truncated model learns from the full one rather than from labels:

        loss(full) + KL(full || truncated), mean over tokens, without a gradient to the full one, + the same penalty.

    Args:
        lasso_weight (`float`, defaults to 1e-6): of the penalty, at least 0. It depends on the scale of weights and on
            their ranks.
        full_pass (`bool`, defaults to `False`): whether there is a pass without truncation.
        *args, **kwargs: of `transformers.Trainer`; a `MaestroCallback()` is added if `callbacks` has none.

    Raises:
        ConfigError: a value that is not allowed; with `full_pass`, gradient checkpointing (a pass would be recomputed
            with the draw of the other), several GPUs in one process, or outputs with one number each.

    Reference:
        As for [`MaestroCallback`]. The paper's scripts leave the full pass out and have a weight of 1e-6, its code has
        5e-3. Differs: the divergence is counted, which is the paper's cross-entropy up to a constant.
    """

    def __init__(self, *args, lasso_weight=1e-6, full_pass=False, callbacks=None, **kwargs):
        check_number("lasso_weight", lasso_weight, 0)
        check_boolean("full_pass", full_pass)
        callbacks = list(callbacks or ())
        # Trainer tells its callbacks when it is made, which is when a dense model gets its factors.
        if not any(isinstance(callback, MaestroCallback) for callback in callbacks):
            callbacks.append(MaestroCallback())
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.lasso_weight = lasso_weight
        self.full_pass = full_pass
        # What is added is counted once a step, so that Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False

    def train(self, *args, **kwargs):
        if self.full_pass:
            refuse_two_passes(self, "MaestroTrainer full_pass=False")
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        if not inner.training:
            return super().compute_loss(model, inputs, return_outputs, None)
        loss, outputs = (self._two_passes if self.full_pass else self._one_pass)(model, inner, inputs)
        if self.lasso_weight:
            for layer in component_layers(inner).values():
                loss = loss + self.lasso_weight * sum(tail.sum() for tail in tails(layer)).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _one_pass(self, model, inner, inputs):
        return super().compute_loss(model, inputs, True, None)

    def _two_passes(self, model, inner, inputs):
        callback = next(c for c in self.callback_handler.callbacks if isinstance(c, MaestroCallback))

        def both(forward, *args, **kwargs):
            open_gates(component_layers(inner))
            full = forward(*args, **kwargs)
            callback.draw(inner, self.state)
            return full, forward(*args, **kwargs)

        found = []

        def first(**batch):
            found.extend(model(**batch))
            return found[0]

        # One call of what wraps the model for several processes: it looks for the parameters in use after each call.
        with replaced_forward(inner, both):
            loss, outputs = super().compute_loss(Computed(inner, first), dict(inputs), True, None)
        full, truncated = (output["logits"] for output in found)
        if full.shape[-1] == 1:
            raise ConfigError(
                "`full_pass`=True compares distributions, and this model puts out one number; use full_pass=False."
            )
        return loss + logit_loss(truncated, full.detach(), predicted_tokens(inner, inputs, full)), outputs
