"""What a refinement is: a frozen dataclass of options that improves a factorized model on its calibration data."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_integer, check_number
from ..errors import CheckpointError
from ..registry import Registry
from ..statistics.masks import MASKS, has_decoder, mask_of


REFINEMENTS = Registry("refine")
register_refinement = REFINEMENTS.register


@dataclass(frozen=True)
class Refinement:
    """Base class of refinements; a subclass is one file in `hf_lowrank/refine`.

    Attributes of a subclass:
        blockwise (`bool`): it trains one block after the other, which therefore must not share factors.
        predicts (`bool`): it reads what the model predicts, at all positions.
    """

    name: ClassVar[str]
    blockwise: ClassVar[bool] = False
    predicts: ClassVar[bool] = False

    def check(self, model, sites, batches):
        """Refuse a model that cannot be refined, before anything is computed; arguments are those of `refine`."""

    def refine(self, model, sites, replace, batches, seed, folder=None, progress=None, teacher=None):
        """Put the factors into `model` and improve them.

        Args:
            model (`torch.nn.Module`): still dense.
            sites (`list[Site]`): what is to be factorized.
            replace (`Callable[[Site], None]`): puts the factors of one site in place of its dense weight.
            batches (`list[dict]`): keyword arguments of the model's forward.
            seed (`int`): of everything random.
            folder (`str`, *optional*): where finished parts are kept, and taken from on the next call.
            progress (`Callable`, *optional*): wraps an iterable, as tqdm does.
            teacher (`torch.nn.Module`, *optional*): the dense model, which stays so. It shares with `model` the
                parameters that are not to be trained.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Descent(Refinement):
    """Options of refinements that train with AdamW; a linear warm-up, then a cosine to zero.

    Args:
        epochs (`int`): passes over the calibration data, at least 0.
        learning_rate (`float`): peak of the schedule, above 0.
        batch_size (`int`, *optional*): sequences a step, at least 1; unset, those of a calibration batch.
        warmup_ratio (`float`, defaults to 0.1): fraction of the steps spent warming up, in [0, 1).
        max_grad_norm (`float`, defaults to 1.0): gradients are clipped to this norm, above 0.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    batch_size: int | None = None
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        check_integer("epochs", self.epochs, 0, self.name)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1, self.name)
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), 0, owner=self.name, open_low=True)
        check_number("warmup_ratio", self.warmup_ratio, 0, 1, owner=self.name, open_high=True)

    def split(self, batches):
        """`batches` in pieces of `batch_size` sequences or fewer, without those of padding alone.

        A batch stays whole where its tensors do not all count the same sequences, as position ids for all of them.
        """
        if self.batch_size is None:
            return batches
        return [piece for batch in batches for piece in _pieces(batch, self.batch_size)]

    def optimizer(self, parameters, total, done=0):
        """`(optimizer, schedule)` for `total` steps, of which some are `done`."""
        optimizer = torch.optim.AdamW(list(parameters), lr=self.learning_rate, weight_decay=0.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(done + step, total))

    def step(self, parameters, optimizer, schedule):
        """One step along the gradients that the parameters hold, which are then gone."""
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def _rate(self, step, total):
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _pieces(batch, size):
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    others = [value for key, value in batch.items() if key not in tensors]
    lengths = {tensor.shape[:1] for tensor in tensors.values()}
    flags = all(value is None or isinstance(value, (bool, int)) for value in others)
    if not flags or len(lengths) != 1 or () in lengths:
        return [batch]
    cuts = zip(*(tensor.split(size) for tensor in tensors.values()), strict=True)
    pieces = [{**batch, **dict(zip(tensors, cut, strict=True))} for cut in cuts]
    masks = [key for key in MASKS if key in tensors]
    return [piece for piece in pieces if all(piece[key].any() for key in masks)]


@contextmanager
def in_training(model, parameters):
    """Inside, `parameters` are float32 and alone ask for gradients, `model` is in eval mode; then all is as it was."""
    before = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)
    try:
        with in_eval(model):
            yield
    finally:
        for p in parameters:
            p.grad = None
        for p, dtype, flag in before:
            p.data = p.data.to(dtype)
            p.requires_grad_(flag)


@contextmanager
def in_eval(model):
    """Inside, `model` is in eval mode: dropout is a difference from the dense model that no factor can make up for."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_mask(batch, tokens, decoder=False):
    """The real tokens of a batch, of the shape `tokens`, or `None` where all are; see [`mask_of`]."""
    mask = mask_of(batch, decoder)
    return mask if mask is not None and mask.shape == tokens else None


def predicted_tokens(model, batch, predictions):
    """The mask of the tokens that `model` makes predictions `(..., classes)` of."""
    return token_mask(batch, predictions.shape[:-1], has_decoder(model))


def read_part(parts, name, mark):
    """`(tensors, note)` of a part that was written with `note["mark"]` equal to `mark`.

    Raises:
        CheckpointError: another run has written it.
    """
    tensors, note = parts.read(name)
    if not isinstance(note, dict) or note.get("mark") != mark:
        raise CheckpointError(
            f"{parts.path(name)} was written by another run (other data, options, or weights); name an empty folder, "
            "or remove this one."
        )
    return tensors, note
