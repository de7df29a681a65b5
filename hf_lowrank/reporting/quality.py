"""What was measured on several models, side by side."""

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Measure:
    """One number of several models.

    Args:
        name (`str`): of the text or the task.
        metric (`str`): what the number is.
        over (`str`): of how much it was measured.
        values (`dict[str, float]`): by the label of the model; only models on which it was measured.
        errors (`dict[str, float]`): standard errors, where known.
        comparable (`bool`): whether all were measured on the same data in the same way.
    """

    name: str
    metric: str
    over: str
    values: dict
    errors: dict
    comparable: bool


def measures_of(quality):
    """All [`Measure`]s of `{label: evaluation}`, each the JSON of an [`Evaluation`].

    Raises:
        ConfigError: an entry that is no evaluation.
    """
    found = {}
    for label, evaluation in quality.items():
        try:
            for name, text in evaluation["perplexity"].items():
                way = (f"{text['windows']} x {text['window']} tokens", text["bos"])
                _add(found, (name, "perplexity"), label, text["perplexity"], None, way, evaluation)
            for name, task in evaluation["multiple_choice"].items():
                metric, way = task["metric"], (f"{task['items']} items",)
                _add(found, (name, metric), label, task[metric], task[f"{metric}_stderr"], way, evaluation)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"`quality`[{label!r}] is not an evaluation ({error!r}); give what hf_lowrank.evaluate returns, or "
                "the JSON that it saved."
            ) from error
    return [
        Measure(
            *key,
            over=" / ".join(dict.fromkeys(way[0] for way, _ in entry["ways"])),
            values=entry["values"],
            errors=entry["errors"],
            comparable=len(set(entry["ways"])) == 1,
        )
        for key, entry in found.items()
    ]


def _add(found, key, label, value, error, way, evaluation):
    entry = found.setdefault(key, {"values": {}, "errors": {}, "ways": []})
    entry["values"][label] = value
    entry["ways"].append((way, evaluation["data"][key[0]]["sha256"]))
    if error is not None:
        entry["errors"][label] = error
