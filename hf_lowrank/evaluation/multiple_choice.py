"""Zero-shot multiple choice: which of the choices the model finds most likely."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..checks import check_choice, check_integer
from ..errors import EvaluationError
from ..integrations.data import read_rows
from .inference import mean_and_error
from .likelihood import loglikelihoods


ITEM = (
    "an item is {'question': str, 'choices': [str, ...], 'label': int}, or, to score one continuation after several "
    "contexts, {'contexts': [str, ...], 'continuation': str, 'label': int}"
)
METRICS = ("acc_norm", "acc")


@dataclass(frozen=True)
class MultipleChoiceTask:
    """Items, and how they become contexts and continuations.

    Args:
        data: a list of items (dicts), a `.jsonl` file of them, or a data set id (`owner/name` or `owner/name:subset`).
            An item has `question`, `choices` and `label`; or `contexts`, `continuation` and `label`, to score one
            continuation after several contexts.
        prompt (`str`, defaults to `"{question}"`): the context, with the item's question in it.
        metric (`str`, defaults to `"acc_norm"`): the one that averages take, `"acc_norm"` or `"acc"`; for items with
            `contexts` it is always `"acc"`.
        limit (`int`, *optional*): items from the start; all of them by default.
        split (`str`, defaults to `"validation"`): of a data set id.
        convert (`Callable`, *optional*): makes an item of a row that is not one.

    Raises:
        ConfigError: a value that is not allowed.
    """

    data: object
    prompt: str = "{question}"
    metric: str = "acc_norm"
    limit: int | None = None
    split: str = "validation"
    convert: Callable | None = field(default=None, repr=False)

    def __post_init__(self):
        check_choice("metric", self.metric, METRICS, "MultipleChoiceTask")
        if self.limit is not None:
            check_integer("limit", self.limit, 1, "MultipleChoiceTask")

    def items(self):
        """`(items, provenance)`: the items, and JSON that says where they are from.

        Raises:
            EvaluationError: no items, rows that are none, or a file or data set that cannot be read.
        """
        rows, name = self.data, "items"
        if isinstance(rows, (str, os.PathLike)):
            path = os.fspath(rows)
            is_file = path.endswith(".jsonl")
            if is_file and not Path(path).exists():
                raise EvaluationError(f"`multiple_choice`={path!r} does not exist.")
            rows = read_rows(path, self.split, "multiple_choice", EvaluationError)
            name = Path(path).name if is_file else f"{path}, {self.split}"
        found = [self._item(row) for row in itertools.islice(rows, self.limit)]
        if not found:
            raise EvaluationError(f"`multiple_choice` holds no items; {ITEM}.")
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        return found, {"data": name, "prompt": self.prompt, "sha256": digest}

    def _item(self, row):
        is_item = isinstance(row.get("choices"), list) or "contexts" in row
        item = row if is_item or self.convert is None else self.convert(row)
        if "contexts" in item:
            keys, count = ("contexts", "continuation", "label"), len(item["contexts"])
        else:
            keys, count = ("question", "choices", "label"), len(item.get("choices", ()))
        if not set(keys) <= set(item) or not all(item.get("choices", (True,))) or item["label"] not in range(count):
            raise EvaluationError(f"`multiple_choice` holds {item!r:.200}; {ITEM}, with a label in range.")
        return {key: item[key] for key in keys}

    def pairs(self, item):
        """The pairs of context and continuation whose likelihoods decide, in the order of the labels."""
        if "contexts" in item:
            return [(context, item["continuation"]) for context in item["contexts"]]
        context = self.prompt.format(question=item["question"])
        return [(context, f" {choice}") for choice in item["choices"]]


@dataclass(frozen=True)
class MultipleChoice:
    """What was measured over the items of one task.

    Args:
        acc (`float`): share of items whose right choice is the most likely.
        acc_stderr (`float`, *optional*): its standard error; `None` for one item.
        acc_norm (`float`, *optional*): the same with log-likelihoods divided by the characters of the choice; `None`
            where the choices are contexts.
        acc_norm_stderr (`float`, *optional*): its standard error.
        acc_bytes (`float`, *optional*): the same, divided by the choice's bytes in UTF-8.
        acc_bytes_stderr (`float`, *optional*): its standard error.
        items (`int`): how many.
        metric (`str`): the one that averages take.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    acc_bytes: float | None
    acc_bytes_stderr: float | None
    items: int
    metric: str

    @property
    def value(self):
        """The metric that averages take."""
        return getattr(self, self.metric)

    @property
    def stderr(self):
        """Its standard error."""
        return getattr(self, f"{self.metric}_stderr")


def multiple_choice(model, tokenizer, task, batch_tokens=2048):
    r"""Score the items of a task without examples.

        argmax_c log p(c | context) / length(c),    length = 1 (acc), characters (acc_norm), bytes (acc_bytes)

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizer`): its tokenizer.
        task ([`MultipleChoiceTask`] or `list[dict]`): the items.
        batch_tokens (`int`, defaults to 2048): tokens of a batch, padding included.

    Returns:
        [`MultipleChoice`].

    Raises:
        EvaluationError: items that are none, or that do not fit the model; or no causal language model.

    Reference:
        EleutherAI, lm-evaluation-harness 0.4.13: a space before each choice, lengths without it, the first of equals.
    """
    task = task if isinstance(task, MultipleChoiceTask) else MultipleChoiceTask(task)
    return score(model, tokenizer, task, task.items()[0], batch_tokens)


def score(model, tokenizer, task, items, batch_tokens):
    """[`MultipleChoice`] of items that were read already."""
    pairs = [task.pairs(item) for item in items]
    flat = iter(loglikelihoods(model, tokenizer, [pair for group in pairs for pair in group], batch_tokens))
    hits = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for item, group in zip(items, pairs, strict=True):
        likelihoods = list(itertools.islice(flat, len(group)))
        lengths = {"acc": [1] * len(group)}
        if "choices" in item:
            lengths["acc_norm"] = [len(choice) for choice in item["choices"]]
            lengths["acc_bytes"] = [len(choice.encode()) for choice in item["choices"]]
        for name, divisors in lengths.items():
            scaled = [likelihood / divisor for likelihood, divisor in zip(likelihoods, divisors, strict=True)]
            hits[name].append(float(scaled.index(max(scaled)) == item["label"]))
    normalized = len(hits["acc_norm"]) == len(items)
    measured = {}
    for name, values in hits.items():
        complete = name == "acc" or normalized
        measured[name], measured[f"{name}_stderr"] = mean_and_error(values) if complete else (None, None)
    return MultipleChoice(**measured, items=len(items), metric=task.metric if normalized else "acc")
