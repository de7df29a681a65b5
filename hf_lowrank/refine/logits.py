import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError, NonFiniteError
from ..parts import Parts, digest_of_batches, digest_of_model
from .base import Descent, in_eval, in_training, predicted_tokens, read_part, register_refinement
from .distillation import logit_loss


STEP = "step-"
# How often a run is kept in its folder: each time takes three numbers a parameter on disk.
TIMES = 16
# What AdamW keeps of a parameter.
STATES = ("step", "exp_avg", "exp_avg_sq")


@register_refinement("logits")
@dataclass(frozen=True)
class LogitRefinement(Descent):
    r"""Train all factors together to predict what the dense model predicts.

        min over all parameters inside blocks    mean_t KL(softmax(model(x)_t) || softmax(model'(x)_t))

    Factors, and in their blocks the biases, norms, and weights that the budget has left dense, are trained, in float32
    whatever they are stored in; a model in half precision computes in its own. What `exclude_modules` or
    `rank_pattern` keeps, and routers, stay as they are. Beside the dense model this takes gradients and optimizer
    states of all that is trained, the activations of a step, and about six times its logits.

    Args:
        epochs (`int`, defaults to 1): passes over the calibration data, at least 0. So many parameters learn little
            data by heart: more epochs need more of it.
        learning_rate (`float`, defaults to 1e-4): peak of the schedule (linear warm-up, then a cosine to zero), above
            0.
        batch_size (`int`, *optional*): sequences a step, at least 1; unset, those of a calibration batch. Of the same
            data, more and smaller steps go further, and need less memory: better far from the dense model, worse near
            it, where the noise of single sequences is all that is left.
        warmup_ratio (`float`, defaults to 0.1): fraction of the steps spent warming up, in [0, 1).
        max_grad_norm (`float`, defaults to 1.0): gradients are clipped to this norm, above 0.

    Raises:
        ConfigError: an option out of range; a model that gives no `logits`.
        NonFiniteError: the loss becomes NaN or infinite.
        CheckpointError: the folder holds finished steps of another run.

    Reference:
        Hinton et al., "Distilling the knowledge in a neural network", 2015, https://arxiv.org/abs/1503.02531. Differs:
        temperature 1 and no labels. To add those, hidden states, or more data, there is `DistillationTrainer`.
    """

    epochs: int = 1
    learning_rate: float = 1e-4
    predicts: ClassVar[bool] = True

    def check(self, model, sites, batches):
        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise ConfigError(
                "`refine`='logits' trains through the whole model, where gradients in float16 vanish; load the model "
                "in bfloat16 or float32."
            )
        with torch.no_grad(), in_eval(model):
            outputs = model(**batches[0])
        if not (isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), torch.Tensor)):
            raise ConfigError(
                f"`refine`='logits' compares predictions, and {type(model).__name__} gives no `logits`; refine a "
                "model with its head, or choose `refine`='blocks'."
            )

    def refine(self, model, sites, replace, batches, seed, folder=None, progress=None, teacher=None):
        batches = self.split(batches)
        with torch.no_grad():
            for site in sites:
                replace(site)
        fixed = {id(p) for p in teacher.parameters()}
        trained = {n: p for n, p in model.named_parameters() if id(p) not in fixed and p.is_floating_point()}
        half = any(p.dtype == torch.bfloat16 for p in trained.values())
        kept = _Kept(folder, trained, lambda: self._decisive(trained, teacher, batches, seed))
        with in_training(model, trained.values()), in_eval(teacher):
            order, done = self._order(len(batches), seed), kept.steps()
            optimizer, schedule = self.optimizer(trained.values(), len(order), done)
            kept.restore(optimizer, done)
            every = math.ceil(len(order) / TIMES)
            steps = list(enumerate(order, 1))[done:]
            for step, index in progress(steps) if progress else steps:
                loss = _divergence(model, teacher, batches[index], half)
                if not torch.isfinite(loss):
                    raise NonFiniteError(
                        f"The refinement of all blocks diverges: its loss is {loss.item()}; lower `learning_rate`="
                        f"{self.learning_rate:g}."
                    )
                loss.backward()
                self.step(trained.values(), optimizer, schedule)
                if step % every == 0 or step == len(order):
                    kept.write(optimizer, step)

    def _order(self, count, seed):
        """The batch of every step."""
        generator = torch.Generator().manual_seed(seed)
        return [index for _ in range(self.epochs) for index in torch.randperm(count, generator=generator).tolist()]

    def _decisive(self, trained, teacher, batches, seed):
        """A digest of everything that decides what training gives: nothing else may be taken for its result."""
        own = digest_of_batches([asdict(self) | {"seed": seed}, dict(trained), *batches])
        return f"{own} {digest_of_model(teacher)}"


class _Kept:
    """How far a run has come, in a folder if there is one: parameters in float32, and what the optimizer knows."""

    def __init__(self, folder, trained, decisive):
        self.trained = trained
        self.parts = None if folder is None else Parts(folder, {})
        self.mark = None if folder is None else decisive()

    def steps(self):
        """How many steps are kept."""
        numbers = [int(name.removeprefix(STEP)) for name in self._names()]
        return max(numbers, default=0)

    def _names(self):
        return [] if self.parts is None else [name for name in self.parts.names() if name.startswith(STEP)]

    def restore(self, optimizer, step):
        """Take parameters and the state of `optimizer` as they were after that step; at 0, nothing."""
        if step == 0:
            return
        tensors, _ = read_part(self.parts, f"{STEP}{step}", self.mark)
        for name, p in self.trained.items():
            p.data.copy_(tensors[name])
            # Nothing is known of a parameter that no sequence has reached so far, as of an expert.
            known = {state: tensors[f"{name}.{state}"] for state in STATES if f"{name}.{state}" in tensors}
            optimizer.state[p] = {state: x if state == "step" else x.to(p.device) for state, x in known.items()}

    def write(self, optimizer, step):
        """Keep what is there after that step, and nothing earlier."""
        if self.parts is None:
            return
        tensors = {}
        for name, p in self.trained.items():
            tensors[name] = p.detach()
            tensors.update({f"{name}.{state}": tensor for state, tensor in optimizer.state.get(p, {}).items()})
        earlier = self._names()
        self.parts.write(f"{STEP}{step}", tensors, {"mark": self.mark})
        for name in earlier:
            self.parts.remove(name)


def _divergence(model, teacher, batch, half):
    """The loss over the real tokens of a batch."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16) if half else nullcontext():
        predicted = model(**batch)["logits"]
    with torch.no_grad():
        expected = teacher(**batch)["logits"]
    return logit_loss(predicted, expected, predicted_tokens(model, batch, predicted))
