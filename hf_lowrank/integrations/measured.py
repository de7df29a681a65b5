"""Results of `hf_lowrank.evaluate` as a table, before and after."""

import json
import os
from pathlib import Path

from ..errors import ConfigError


# What a card reads of an evaluation; `EACH` stands for all names that there are.
EACH = "*"
LAYOUT = {
    "size": {"parameters": {}, "bytes": {}},
    "model": {"class": {}},
    "environment": {"torch": {}, "transformers": {}},
    "command": {},
    "perplexity": {EACH: {"perplexity": {}, "windows": {}, "window": {}, "bos": {}}},
    "multiple_choice": {EACH: {"items": {}, "metric": {}}},
    "data": {EACH: {"sha256": {}}},
}


def as_json(evaluation):
    """The JSON of an [`Evaluation`], of the file that its `save` writes, or as it is; `None` for `None`.

    Raises:
        ConfigError: a file that is not such a one.
    """
    if isinstance(evaluation, (str, os.PathLike)):
        try:
            return json.loads(Path(evaluation).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Cannot read an evaluation from {evaluation}: {error}; give a file that "
                "`hf_lowrank.evaluate(...).save(path)`, or `evaluate --output`, has written."
            ) from error
    return evaluation.to_json() if hasattr(evaluation, "to_json") else evaluation


def check_measured(argument, evaluation):
    """Refuse JSON that is no evaluation; `argument` is what the user called it.

    Raises:
        ConfigError: something is missing that a card is made of.
    """
    lacks = _lacks(evaluation, LAYOUT)
    if lacks is not None:
        raise ConfigError(
            f"`{argument}` {lacks}, and is no evaluation then; give what hf_lowrank.evaluate returned, its JSON, or "
            "the file that `hf_lowrank.evaluate(...).save(path)` has written."
        )


def _lacks(found, layout, path=()):
    """What is missing of `layout` in `found`, in words, or `None`."""
    if not layout:
        return None
    if not isinstance(found, dict):
        where = f" at {'.'.join(path)!r}" if path else ""
        return f"holds {type(found).__name__}, not a dict{where}"
    for name, inside in layout.items():
        for key in found if name == EACH else (name,):
            if key not in found:
                return f"has no {'.'.join((*path, key))!r}"
            lacks = _lacks(found[key], inside, (*path, key))
            if lacks is not None:
                return lacks
    return None


def quality(after, before=None):
    """Markdown: what was measured on this model, and on the base model beside it, and by which command.

    Args:
        after (`dict`, *optional*): JSON of an [`Evaluation`].
        before (`dict`, *optional*): the same of the base model.

    Raises:
        ConfigError: `before` was measured on other data, or otherwise.
    """
    if after is None:
        return "Not measured; `hf_lowrank.evaluate` would."
    if before is not None and protocol(before) != protocol(after):
        raise ConfigError(
            "`dense` and `evaluation` were measured on different texts, windows or items, so that their numbers do "
            "not compare; measure both with the same arguments of hf_lowrank.evaluate."
        )
    columns = [after] if before is None else [before, after]
    head = ["", "this model"] if before is None else ["", "base model", "this model"]
    lines = [head, ["---", *["--:"] * len(columns)]]
    for name, text in after["perplexity"].items():
        what = f"{name}, perplexity over {text['windows']} x {text['window']} tokens"
        lines.append([what, *(f"{column['perplexity'][name]['perplexity']:.2f}" for column in columns)])
    for name, task in after["multiple_choice"].items():
        what = f"{name}, {task['metric']} over {task['items']} items, zero-shot"
        lines.append([what, *(_accuracy(column["multiple_choice"][name]) for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    errors = " Behind ± is one standard error." if "±" in table else ""
    by = ", ".join(f"{name} {after['environment'][name]}" for name in ("torch", "transformers"))
    return f"{table}\n\nMeasured by `{after['command']}`, with {by}.{errors} Nothing else was measured."


def protocol(evaluation):
    """What two results must have in common for their numbers to compare."""
    texts = {name: (text["windows"], text["window"], text["bos"]) for name, text in evaluation["perplexity"].items()}
    tasks = {name: (task["items"], task["metric"]) for name, task in evaluation["multiple_choice"].items()}
    return texts, tasks, {name: data["sha256"] for name, data in evaluation["data"].items()}


def _accuracy(task):
    error = task[f"{task['metric']}_stderr"]
    return f"{task[task['metric']]:.3f}" + ("" if error is None else f" ± {error:.3f}")
