"""Every push of a factorized model, or of an adapter that needs this package, carries a card: in the same commit.

transformers and PEFT upload by one method of `PushToHubMixin`, after they have written a README.md of their own. That
method is wrapped, and `push_to_hub`, for its keywords. `Trainer` writes its README.md in `create_model_card`.
"""

import functools
import math
import sys
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers.utils import PushToHubMixin

from ..errors import ConfigError
from ..readme import README, merged, write
from ..surgery import factorized
from ..upload import WEIGHTS, upload
from .autoload import PACKAGE, after_import
from .model_card import has_adapters, model_card


TRAINER = "transformers.trainer"
# What `push_to_hub` was asked for; transformers has no argument that would take it to the upload.
asked = ContextVar("asked", default=(True, None))


def install_push():
    """Wrap what pushes, `Trainer` as soon as it is imported; idempotent."""
    push, original = PushToHubMixin.push_to_hub, PushToHubMixin._upload_modified_files
    if hasattr(push, "lowrank_keywords"):
        return

    @functools.wraps(push)
    def push_to_hub(self, *args, model_card=True, tokenizer=None, **kwargs):
        _check(model_card)
        token = asked.set((model_card, tokenizer))
        try:
            return push(self, *args, **kwargs)
        finally:
            asked.reset(token)

    @functools.wraps(original)
    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        chosen, tokenizer = asked.get()
        if tokenizer is not None:
            tokenizer.save_pretrained(working_dir)
        card = card_for(self, repo_id, chosen, kwargs.get("token"))
        if card is None:
            return original(self, working_dir, repo_id, files_timestamps, **kwargs)
        return _upload(self, Path(working_dir), repo_id, files_timestamps, card, card is chosen, **kwargs)

    push_to_hub.lowrank_keywords = True
    PushToHubMixin.push_to_hub = push_to_hub
    PushToHubMixin._upload_modified_files = _upload_modified_files
    if TRAINER in sys.modules:
        _install_trainer(sys.modules[TRAINER])
    else:
        after_import(TRAINER, _install_trainer)


def _install_trainer(module):
    original = module.Trainer.create_model_card

    @functools.wraps(original)
    def create_model_card(self, *args, model_card=True, **kwargs):
        _check(model_card)
        original(self, *args, **kwargs)
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        card = card_for(model, self.hub_model_id, model_card, self.args.hub_token)
        if card is not None:
            path = Path(self.args.output_dir, README)
            write(merged(ModelCard.load(path), card, card is model_card), path)

    module.Trainer.create_model_card = create_model_card


def card_for(model, repo_id, chosen=True, token=None):
    """The card a push of `model` takes along, or `None`.

    Args:
        model: what is pushed.
        repo_id (`str`): where to.
        chosen (`bool` or `huggingface_hub.ModelCard`, defaults to `True`): `False` for none, a card for this one.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.
    """
    if isinstance(chosen, ModelCard):
        return chosen
    if not chosen or not isinstance(model, nn.Module) or not _needs_package(model):
        return None
    return model_card(model, repo_id, token=token)


def _needs_package(model):
    if factorized(model):
        return True
    # Files of our tuners name the package in the type of the adapter.
    return has_adapters(model) and any(
        PACKAGE in str(config.to_dict()["peft_type"]) for config in model.peft_config.values()
    )


def _check(card):
    if not isinstance(card, (bool, ModelCard)):
        raise ConfigError(
            f"`model_card`={card!r:.100} must be True for a card that is generated, False for none of ours, or a card "
            "such as hf_lowrank.model_card(model) makes."
        )


def _upload(model, folder, repo_id, before, card, prefer_card, commit_message=None, create_pr=False, **options):
    """Upload what is new in `folder` since the times `before`; arguments of `_upload_modified_files` behind these."""
    written = ModelCard.load(folder / README).data.get("tags")
    # Where transformers wrote the `tags` that `push_to_hub` was given.
    card = ModelCard(card.content)
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(written or ())]))
    new = [path for path in folder.iterdir() if path.stat().st_mtime > before.get(path.name, -math.inf)]
    paths = [path for top in new for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    return upload(
        files,
        repo_id,
        card,
        prefer_card,
        WEIGHTS if any(WEIGHTS.fullmatch(name) for name in files) else None,
        commit_message=commit_message or f"Upload {type(model).__name__}",
        create_pr=create_pr,
        **options,
    )
