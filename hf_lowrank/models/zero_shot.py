"""Heads for images from the names of classes, by a model that has features of texts."""

import torch
from torch import nn

from ..errors import ConfigError
from .shared_basis_head import SharedBasisHead


@torch.no_grad()
def zero_shot_head(model, processor, labels, template="a photo of a {}.", num_basis=0.95, **options):
    """A [`SharedBasisHead`] for the images of a model that has text features, from the names of classes alone.

    Args:
        model (`torch.nn.Module`): of images and texts, with `get_text_features`; its `logit_scale`, where it has
            one, is where the head's starts.
        processor (`Callable`): a processor or tokenizer of the model.
        labels (`list[str]`): names of the classes.
        template (`str` or `list[str]`, defaults to `"a photo of a {}."`): the sentences around a name; the normalized
            features of several are averaged.
        num_basis, options: of [`SharedBasisHead.from_features`].

    Returns:
        [`SharedBasisHead`], for `model.get_image_features(...)`; a new class is added with the features of
        [`text_features`].

    Raises:
        ConfigError: a model without text features, no label, or a template without a place for the name.
    """
    features = text_features(model, processor, labels, template)
    learned = getattr(model, "logit_scale", None)
    scale = {} if learned is None else {"scale": learned.detach().double().exp().item()}
    return SharedBasisHead.from_features(features, num_basis, **{**scale, **options})


@torch.no_grad()
def text_features(model, processor, labels, template="a photo of a {}."):
    """Normalized text features `(classes, d)` of class names; arguments as of [`zero_shot_head`].

    Raises:
        ConfigError: as [`zero_shot_head`].
    """
    if not hasattr(model, "get_text_features"):
        raise ConfigError(
            f"`model` is a {type(model).__name__} without `get_text_features`; give a model of images and texts, or "
            "features of your own to SharedBasisHead.from_features."
        )
    templates = [template] if isinstance(template, str) else list(template)
    if isinstance(labels, str) or not labels:
        raise ConfigError(f"`labels`={labels!r} must be a non-empty list of names.")
    if not templates or any("{}" not in each for each in templates):
        raise ConfigError(f"`template`={template!r} needs a place for the name of the class, '{{}}'.")
    total = 0
    for each in templates:
        inputs = processor(text=[each.format(label) for label in labels], return_tensors="pt", padding=True)
        found = model.get_text_features(**{key: value.to(model.device) for key, value in inputs.items()})
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        total = total + nn.functional.normalize(found, dim=-1)
    return nn.functional.normalize(total, dim=-1)
