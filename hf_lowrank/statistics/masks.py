"""Which rows of an activation are real tokens, which are padding, and which sample they belong to."""

import math
import weakref
from contextlib import contextmanager

import torch


UNALIGNED = object()
# What tells tokens from padding: of the only or first stack of blocks, and of a decoder behind it.
MASKS = ("attention_mask", "decoder_attention_mask")
# The label of what a loss leaves out.
IGNORED = -100


class Masks:
    """Which rows of an activation are real tokens: the attention masks of a batch, matched to activations by shape."""

    def __init__(self, model):
        self._decoder = set()
        self._encoder = None
        if has_decoder(model):
            decoder = model.get_decoder()
            prefix = next(name for name, module in model.named_modules() if module is decoder)
            self._decoder = {f"{prefix}.{name}" for name, _ in decoder.named_modules()}
            self._encoder = model.get_encoder()
        self._encoded = lambda: None
        self._first = self._second = None
        self._samples = 0

    @contextmanager
    def watching(self):
        """Remembers the encoder's output inside, which cross-attention reads under the encoder's mask."""
        if self._encoder is None:
            yield
            return

        def remember(_, __, output):
            self.set_encoded(output[0])

        handle = self._encoder.register_forward_hook(remember)
        try:
            yield
        finally:
            handle.remove()

    def set_encoded(self, tensor):
        """Take `tensor` for the encoder's output, as long as it lives."""
        self._encoded = weakref.ref(tensor)

    def is_encoded(self, tensor):
        """Whether `tensor` is the encoder's output of this batch."""
        return tensor is self._encoded()

    def start_batch(self, batch):
        """Read the masks of one batch; returns how many samples it has."""
        self._first = mask_of(batch)
        self._second = mask_of(batch, decoder=True) if self._decoder else None
        self._samples = batch_size(batch)
        return self._samples

    def count(self, batch):
        """Real tokens of the batch, or its samples where it has no token ids."""
        if self._first is not None:
            return int(self._first.sum())
        ids = batch.get("input_ids")
        return ids.numel() if ids is not None else batch_size(batch)

    def chooser(self, name, tensor, routed=None):
        """Which rows of `tensor` at the site `name` are real tokens.

        Args:
            name (`str`): the site, which may belong to the decoder.
            tensor (`torch.Tensor`): its input or output.
            routed (`tuple`, *optional*): `(token of each row, number of tokens, expert of each row)` where a router
                has picked and sorted the rows.

        Returns:
            A boolean mask of rows, `None` for all, or `UNALIGNED` where padding cannot be told apart.
        """
        if routed is not None:
            return self._routed(*routed[:2])
        rows = math.prod(tensor.shape[:-1])
        masks = [self._first, self._second]
        if name in self._decoder and not self.is_encoded(tensor):
            masks.reverse()
            if masks[0] is None:
                return None
        for mask in masks:
            if mask is None:
                continue
            if tensor.shape[:-1] == mask.shape or (tensor.ndim == 2 and rows == mask.numel()):
                return None if mask.all() else mask.flatten()
            if tensor.shape[:-1] == mask.T.shape:
                return None if mask.all() else mask.T.flatten()
        # One row a sample (a pooler): nothing to remove.
        padded = any(mask is not None and not mask.all() for mask in masks)
        per_sample = any(mask is not None and tensor.ndim == 2 and rows == mask.shape[0] for mask in masks)
        return None if per_sample or not padded else UNALIGNED

    def samples(self, tensor, routed=None):
        """The number, within the batch, of the sample that each row of `tensor` belongs to.

        Args:
            tensor (`torch.Tensor`): the input or output of a layer.
            routed (`tuple`, *optional*): as in `chooser`.

        Returns:
            `(rows,)`, or `UNALIGNED` where rows are no multiple of the samples.
        """
        tokens = math.prod(tensor.shape[:-1]) if routed is None else routed[1]
        if tokens % self._samples:
            return UNALIGNED
        sample = torch.arange(self._samples, device=tensor.device)
        each = tokens // self._samples
        if routed is not None:
            return sample.repeat_interleave(each)[routed[0].to(tensor.device)]
        # Some models put time first.
        time_first = tensor.ndim == 3 and tensor.shape[0] != self._samples and tensor.shape[1] == self._samples
        return sample.repeat(each) if time_first else sample.repeat_interleave(each)

    def of_output(self, tensor):
        """The mask of the tokens in something the model gives, `None` for all."""
        return self._second if self._decoder and not self.is_encoded(tensor) else self._first

    def _routed(self, token_index, tokens):
        masks = [mask for mask in (self._first, self._second) if mask is not None and not mask.all()]
        for mask in masks:
            if mask.numel() == tokens:
                return mask.flatten().to(token_index.device)[token_index]
        return UNALIGNED if masks else None


def batch_size(batch):
    """Samples in a batch: the length of its token ids, or of its first tensor."""
    ids = batch.get("input_ids")
    if ids is None:
        ids = next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    return len(ids)


def has_decoder(model):
    """Whether a decoder reads what an encoder has made, each with a mask of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def mask_of(batch, decoder=False):
    """The real tokens in the arguments of a forward, boolean, `None` for all.

    With `decoder`, those that the decoder of an encoder-decoder reads: without a mask of them, what has a label.
    """
    found, labels = _as_mask(batch.get(MASKS[decoder])), _as_ids(batch.get("labels"))
    return labels != IGNORED if decoder and found is None and labels is not None else found


def _as_mask(mask):
    ids = _as_ids(mask)
    return None if ids is None else ids.bool()


def _as_ids(tensor):
    return tensor if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 else None
