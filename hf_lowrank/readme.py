"""README.md of a repository: rendered from a template, merged into what a user wrote, read for its licence."""

import logging
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id


logger = logging.getLogger(__name__)

README = "README.md"
TAGS = ("hf-lowrank", "low-rank")
TEMPLATES = Path(__file__).with_name("templates")
# What each push writes anew; the templates have it in these two comments.
MARKED = re.compile(r"<!-- hf_lowrank:.*?<!-- /hf_lowrank -->", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")


def repository(name):
    """`name` if it can be that of a repository on the Hub, else `None`: where a folder lies says nothing to others."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def rendered(template, metadata, **values):
    """A card from one of the `templates`.

    Args:
        template (`str`): name of the file, without its ending.
        metadata (`dict`): of the YAML block; entries that are `None` are left out.
        values: what the template asks for.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    return ModelCard.from_template(ModelCardData(**metadata), str(TEMPLATES / f"{template}.md"), **values)


def merged(own, card, prefer_card=False):
    """`card` as it has to stand in a repository whose README.md is `own`.

    Text of `own` stays but for the marked part, which is replaced, or added at the end. Its metadata stays too: tags
    are joined, and other entries of `card` fill gaps.

    Args:
        own (`huggingface_hub.ModelCard`, *optional*): what is there.
        card (`huggingface_hub.ModelCard`): what is pushed.
        prefer_card (`bool`, defaults to `False`): let metadata of `card` win.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    if own is None:
        return card
    result, part = ModelCard(own.content), MARKED.search(card.text)
    if part is None or not own.text.strip():
        result.text = card.text
    elif MARKED.search(own.text):
        result.text = MARKED.sub(lambda _: part[0], own.text, count=1)
    else:
        result.text = f"{own.text.rstrip()}\n\n{part[0]}\n"
    old, new = own.data.to_dict(), card.data.to_dict()
    first, second = (new, old) if prefer_card else (old, new)
    both = {**second, **first, "tags": list(dict.fromkeys([*old.get("tags", ()), *new.get("tags", ())]))}
    for whole in (LICENCE, ("base_model", "base_model_relation")):
        # These belong together: a name to its licence, a relation to its base model.
        if first.get(whole[0], second.get(whole[0])) != second.get(whole[0]):
            both.update({key: first.get(key) for key in whole})
    result.data = ModelCardData(**both)
    return result


def write(card, path):
    """Put a card into a file, which never holds half of it."""
    partial = f"{os.fspath(path)}.partial"
    try:
        card.save(partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def readme_at(repo_id, revision=None, token=None):
    """The README.md of a repository as it stands at this moment, or `None` if there is none.

    Anything but its absence raises, so that a hiccup of the network never makes a push overwrite it.

    Args:
        repo_id (`str`): the repository.
        revision (`str`, *optional*): a branch.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.
    """
    try:
        path = hf_hub_download(repo_id, README, revision=revision, token=token, force_download=True)
    except RemoteEntryNotFoundError:
        return None
    return ModelCard.load(path)


def inherited(source, token=None):
    """Licence and language by the README.md of the folder or repository `source`; empty where none can be read.

    Args:
        source (`str`, *optional*): a folder or a repository.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.
    """
    if not source:
        return {}
    try:
        path = Path(source, README) if os.path.isdir(source) else hf_hub_download(source, README, token=token)
        found = ModelCard(Path(path).read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data
    except (OSError, ValueError, EntryNotFoundError, yaml.YAMLError) as error:
        logger.info("No licence is taken over from %s, whose README.md cannot be read: %s", source, error)
        return {}
    return {key: found.get(key) for key in (*LICENCE, "language") if found.get(key) is not None}
