"""The verb: measure a model."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError, EvaluationError
from ..integrations.calibration import load_tokenizer
from ..provenance import command, describe, environment
from .inference import check_causal, max_length
from .multiple_choice import MultipleChoiceTask, score
from .perplexity import PerplexityTask
from .perplexity import perplexity as window_perplexity
from .presets import PRESETS
from .result import Evaluation
from .size import size_of
from .tasks import TASKS


def evaluate(
    model,
    tokenizer=None,
    perplexity=None,
    multiple_choice=None,
    preset=None,
    max_windows=None,
    limit=None,
    batch_tokens=2048,
):
    r"""Measure a causal language model: perplexity of texts, zero-shot multiple choice, size.

    Nothing is drawn at random: the same model and data give the same numbers.

    Args:
        model (`PreTrainedModel`): dense, factorized or quantized, in memory or dispatched.
        tokenizer (`PreTrainedTokenizer`, *optional*): by default the one at `model.name_or_path`.
        perplexity (*optional*): what `data` of [`PerplexityTask`] accepts, a [`PerplexityTask`], or a dict of these by
            name. Without a preset, windows have 2048 tokens, or as many as the model has positions.
        multiple_choice (*optional*): a dict from names to what `data` of [`MultipleChoiceTask`] accepts or to
            [`MultipleChoiceTask`]s; or a list of names, these and no others. The names in
            `hf_lowrank.evaluation.TASKS` bring the prompts of lm-eval and a data set id with them.
        preset (`str`, *optional*): a published protocol, one of `hf_lowrank.evaluation.PRESETS`. The two arguments
            above then replace the data of its entries by name, `None` as data leaves an entry out, and an empty dict
            leaves out the whole part.
        max_windows (`int`, *optional*): of each text at most, at least 1; all of them by default.
        limit (`int`, *optional*): items of each task at most, at least 1; all of them by default.
        batch_tokens (`int`, defaults to 2048): tokens of a batch of multiple choice, padding included.

    Returns:
        [`Evaluation`]; `print` it, or `.save("quality.json")`.

    Raises:
        ConfigError: an argument that is not allowed.
        EvaluationError: data that cannot be read or scored, or a model that is no causal language model.

    Reference:
        Preset `"lowrank_arena"`: LowRankArena, arXiv:2608.26389. Its texts and tasks are data set ids, so it needs the
        Hub; it was run only on local files so far.
    """
    started = time.perf_counter()
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"`preset`={preset!r} must be one of {sorted(PRESETS)}.")
    check_causal(model)
    texts = _texts(perplexity, PRESETS[preset].perplexity if preset else {}, min(2048, max_length(model) or 2048))
    tasks = _tasks(multiple_choice, PRESETS[preset].multiple_choice if preset else {})
    if not texts and not tasks:
        raise ConfigError("There is nothing to measure; give `perplexity`, `multiple_choice` or `preset`.")
    if tokenizer is None and (tasks or any(text.needs_tokenizer for text in texts.values())):
        tokenizer = load_tokenizer(getattr(model, "name_or_path", ""), "perplexity", EvaluationError)
    texts = {name: _at_most(text, "max_windows", max_windows) for name, text in texts.items()}
    tasks = {name: _at_most(task, "limit", limit) for name, task in tasks.items()}
    # Everything is read before anything is measured, so that a missing file costs no hours.
    read_texts = {name: text.token_ids(tokenizer) for name, text in texts.items()}
    read_tasks = {name: task.items() for name, task in tasks.items()}
    perplexities, accuracies = {}, {}
    for name, (ids, _) in read_texts.items():
        bos = _beginning(tokenizer) if texts[name].bos else None
        perplexities[name] = window_perplexity(model, ids, texts[name].window, texts[name].max_windows, bos)
    for name, (items, _) in read_tasks.items():
        accuracies[name] = score(model, tokenizer, tasks[name], items, batch_tokens)
    return Evaluation(
        perplexity=perplexities,
        multiple_choice=accuracies,
        size=size_of(model),
        model=describe(model),
        data={name: provenance for name, (_, provenance) in {**read_texts, **read_tasks}.items()},
        environment=environment(),
        preset=preset,
        command=command(),
        seconds=time.perf_counter() - started,
    )


def _texts(given, preset, window):
    """The named [`PerplexityTask`]s of the argument `perplexity` over those of a preset."""
    if given is not None and not isinstance(given, Mapping):
        given = {_name(given): given}
    texts = _over(preset, given)
    for name, data in texts.items():
        if not isinstance(data, PerplexityTask):
            base = preset.get(name, PerplexityTask(None, window=window))
            texts[name] = replace(base, data=data)
    return texts


def _tasks(given, preset):
    """The named [`MultipleChoiceTask`]s of the argument `multiple_choice` over those of a preset."""
    known = {**TASKS, **preset}
    if isinstance(given, (str, list, tuple)):
        names = [given] if isinstance(given, str) else given
        unknown = [name for name in names if not isinstance(name, str) or name not in known]
        if unknown:
            raise ConfigError(
                f"`multiple_choice` names {unknown!r:.200}; known are {sorted(known)}. Give other items as "
                "{name: items}."
            )
        return {name: known[name] for name in names}
    tasks = _over(preset, given)
    for name, data in tasks.items():
        if not isinstance(data, MultipleChoiceTask):
            tasks[name] = replace(known.get(name, MultipleChoiceTask(None)), data=data)
    return tasks


def _over(preset, given):
    """Entries of a preset with the given ones in their places; `None` leaves one out, an empty dict all."""
    if given is None:
        return dict(preset)
    return {name: data for name, data in {**(preset if given else {}), **given}.items() if data is not None}


def _name(data):
    """What a text that was given without a name is called."""
    data = data.data if isinstance(data, PerplexityTask) else data
    is_file = isinstance(data, (str, os.PathLike)) and os.fspath(data).endswith((".txt", ".jsonl"))
    return Path(data).stem if is_file else "text"


def _at_most(task, name, value):
    """The task with its `max_windows` or `limit` lowered to `value`."""
    own = getattr(task, name)
    return task if value is None else replace(task, **{name: value if own is None else min(own, value)})


def _beginning(tokenizer):
    if tokenizer.bos_token_id is None:
        raise EvaluationError("`bos` is asked for, and the tokenizer has no beginning-of-text token.")
    return tokenizer.bos_token_id
