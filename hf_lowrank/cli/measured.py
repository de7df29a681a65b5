"""What `evaluate --output` has written, read again and looked at before it is used."""

from dataclasses import fields

from ..errors import ConfigError
from ..evaluation import Evaluation, MultipleChoice, Perplexity, Size
from ..integrations.measured import as_json


def measured(path, option):
    """The JSON of an [`Evaluation`] in a file; `None` for `None`.

    Args:
        path (`str`, *optional*): the file.
        option (`str`): that named it, for messages.

    Raises:
        ConfigError: the file cannot be read, or is something else.
    """
    if path is None:
        return None
    found = as_json(path)
    for entry, value, needed in _parts(found):
        is_mapping = isinstance(value, dict)
        missing = sorted(set(needed) - set(value)) if is_mapping else []
        if missing or not is_mapping:
            wrong = f"lacks {missing}" if is_mapping else "is no mapping"
            raise ConfigError(
                f"`{option}` {path} is not what `evaluate --output` writes: {entry} {wrong}; measure the model again, "
                "and give the file that this writes."
            )
    return found


def _parts(found):
    """`(what it is, value, keys that it needs)` of everything with keys of its own, the outer ones first."""
    yield "the file", found, _names(Evaluation)
    yield "`size`", found["size"], _names(Size)
    yield "`model`", found["model"], ["class"]
    yield "`environment`", found["environment"], ["torch", "transformers"]
    for part, cls in (("perplexity", Perplexity), ("multiple_choice", MultipleChoice)):
        yield f"`{part}`", found[part], []
        for name, value in found[part].items():
            yield f"{name!r} of `{part}`", value, _names(cls)
    yield "`data`", found["data"], [*found["perplexity"], *found["multiple_choice"]]
    for name, value in found["data"].items():
        yield f"{name!r} of `data`", value, ["sha256"]


def _names(cls):
    return [f.name for f in fields(cls)]
