"""Perplexity over contiguous windows."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import check_integer
from ..errors import ConfigError, EvaluationError, NonFiniteError
from ..integrations.data import read_texts
from .inference import check_causal, inference, max_length, mean_and_error


JOINS = ("text", "tokens")


@dataclass(frozen=True)
class PerplexityTask:
    r"""A text, and how it becomes windows of tokens. No special tokens are added.

    Args:
        data: a text, a list of texts, a `.txt` or `.jsonl` file, a data set id (`owner/name` or `owner/name:subset`),
            or token ids `(tokens,)`. A string is a text if it has a space or a line break in it.
        window (`int`, defaults to 2048): tokens fed to the model at once, at least 2.
        max_windows (`int`, *optional*): whole windows from the start; all of them by default. The rest is dropped.
        bos (`bool`, defaults to `False`): begin every window with the beginning-of-text token, so that all its
            `window` tokens are predicted; otherwise the first is not, and `window - 1` are.
        join (`str`, defaults to `"text"`): `"text"` joins the texts by `separator` and tokenizes the whole;
            `"tokens"` tokenizes each text that is not blank, and joins the tokens by those of `separator`, reading no
            more texts than the windows need.
        separator (`str`, defaults to `"\n\n"`): between texts.
        split (`str`, defaults to `"test"`): of a data set id.
        text_column (`str`, defaults to `"text"`): of a data set or `.jsonl` file.

    Raises:
        ConfigError: a value that is not allowed.
    """

    data: object
    window: int = 2048
    max_windows: int | None = None
    bos: bool = False
    join: str = "text"
    separator: str = "\n\n"
    split: str = "test"
    text_column: str = "text"

    def __post_init__(self):
        _check_sizes(self.window, self.max_windows)
        if self.join not in JOINS:
            raise ConfigError(f"`join`={self.join!r} of PerplexityTask must be one of {list(JOINS)}.")

    @property
    def needs_tokenizer(self):
        """Whether `data` has to be tokenized, or `bos` to be looked up."""
        return self.bos or not _are_ids(self.data)

    def token_ids(self, tokenizer):
        """`(ids, provenance)`: token ids `(tokens,)`, and JSON that says what they are of.

        Raises:
            EvaluationError: no text, or a file or data set that cannot be read.
        """
        if _are_ids(self.data):
            ids = torch.as_tensor(self.data, dtype=torch.long).flatten()
            return ids, {"data": "token ids", "sha256": _digest(str(ids.tolist()))}
        texts, name = self._texts()
        if self.join == "tokens":
            ids, digest = self._joined_tokens(texts, tokenizer)
        else:
            whole = self.separator.join(texts)
            ids, digest = _encode(tokenizer, whole), _digest(whole)
        provenance = {"data": name, "join": self.join, "separator": self.separator, "sha256": digest}
        return torch.tensor(ids, dtype=torch.long), provenance

    def _texts(self):
        data = self.data
        if isinstance(data, (list, tuple)):
            return data, f"{len(data)} texts"
        path = os.fspath(data)
        if isinstance(data, str) and any(c.isspace() for c in path) and not Path(path[:255]).exists():
            return [path], "a text"
        is_file = path.endswith((".txt", ".jsonl"))
        if is_file and not Path(path).exists():
            raise EvaluationError(f"`perplexity`={path!r} does not exist.")
        texts = read_texts(path, self.split, self.text_column, "perplexity", "PerplexityTask", EvaluationError)
        return texts, Path(path).name if is_file else f"{path}, {self.split}"

    def _joined_tokens(self, texts, tokenizer):
        wanted = math.inf if self.max_windows is None else self.max_windows * self.window
        between, ids, digest = _encode(tokenizer, self.separator), [], hashlib.sha256()
        for text in texts:
            if not text.strip():
                continue
            if ids:
                ids.extend(between)
            ids.extend(_encode(tokenizer, text))
            digest.update(text.encode())
            if len(ids) >= wanted:
                return ids[:wanted], digest.hexdigest()
        return ids, digest.hexdigest()


@dataclass(frozen=True)
class Perplexity:
    """What was measured over windows of one text.

    Args:
        perplexity (`float`): `exp(nll)`.
        nll (`float`): negative log-likelihood, in nats a predicted token.
        nll_stderr (`float`, *optional*): standard error of `nll` over windows; `None` for one window.
        tokens (`int`): predicted tokens.
        windows (`int`): contiguous and non-overlapping.
        window (`int`): tokens in each.
        bos (`bool`): whether each began with the beginning-of-text token.
    """

    perplexity: float
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int
    window: int
    bos: bool


def perplexity(model, ids, window=2048, max_windows=None, bos=None):
    r"""Perplexity over contiguous, non-overlapping windows, each read by itself.

        exp(- 1/N sum_w sum_t log p(x_{w,t} | x_{w,<t})),    N = predicted tokens

    Tokens behind the last whole window are dropped. Log-probabilities are computed in float32.

    Args:
        model (`PreTrainedModel`): a causal language model.
        ids (`torch.Tensor` or `list[int]`): token ids `(tokens,)`.
        window (`int`, defaults to 2048): tokens fed to the model at once, at least 2.
        max_windows (`int`, *optional*): whole windows from the start; all of them by default.
        bos (`int`, *optional*): a token id to begin every window with; each then predicts `window` tokens, else
            `window - 1`.

    Returns:
        [`Perplexity`].

    Raises:
        ConfigError: `window` is too small, or more than the model's positions.
        EvaluationError: fewer than `window` tokens, or a model that is no causal language model.
        NonFiniteError: the model's logits are not finite.
    """
    check_causal(model)
    _check_sizes(window, max_windows)
    limit = max_length(model)
    if limit is not None and window > limit:
        raise ConfigError(f"`window`={window} exceeds the {limit} positions of the model; lower it.")
    ids = torch.as_tensor(ids, dtype=torch.long).flatten()
    count = len(ids) // window
    if not count:
        raise EvaluationError(
            f"The text has {len(ids)} tokens, fewer than one `window`={window}; give more text or lower `window`."
        )
    count = min(count, count if max_windows is None else max_windows)
    losses = []
    with inference(model) as device:
        for index, block in enumerate(ids[: count * window].view(count, window).to(device)):
            inputs, targets = (block[:-1], block[1:]) if bos is None else (_begin(block, bos), block)
            logits = model(input_ids=inputs[None], use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device)).item()
            if not math.isfinite(loss):
                raise NonFiniteError(f"The loss in window {index} is {loss}; the model's logits are not finite.")
            losses.append(loss)
    # Windows are equally long, so the mean over windows is the mean over tokens.
    nll, error = mean_and_error(losses)
    return Perplexity(
        torch.tensor(nll, dtype=torch.float64).exp().item(),
        nll,
        error,
        count * len(targets),
        count,
        window,
        bos is not None,
    )


def _begin(block, bos):
    return torch.cat([block.new_tensor([bos]), block[:-1]])


def _check_sizes(window, max_windows):
    check_integer("window", window, 2)
    if max_windows is not None:
        check_integer("max_windows", max_windows, 1)


def _are_ids(data):
    if isinstance(data, torch.Tensor):
        return True
    return isinstance(data, Sequence) and not isinstance(data, str) and bool(data) and isinstance(data[0], int)


def _encode(tokenizer, text):
    # `verbose` would warn of a length that no window reaches.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()
