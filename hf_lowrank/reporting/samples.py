"""Texts of several models side by side."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """What several models wrote after one prompt.

    Args:
        prompt (`str`): what they were given.
        texts (`dict[str, str]`): what followed, by the label of the model.
    """

    prompt: str
    texts: dict


def as_samples(samples):
    """`list[Sample]` from what users give.

    Raises:
        ConfigError: entries of another form.
    """
    found = []
    for entry in samples or ():
        entry = asdict(entry) if is_dataclass(entry) else entry
        fits = isinstance(entry, Mapping) and set(entry) == {"prompt", "texts"} and isinstance(entry["texts"], Mapping)
        if not fits or not all(isinstance(text, str) for text in (entry["prompt"], *entry["texts"].values())):
            raise ConfigError(
                f"`samples` holds {entry!r:.200}; an entry is {{'prompt': str, 'texts': {{label: str, ...}}}}."
            )
        found.append(Sample(entry["prompt"], dict(entry["texts"])))
    return found
