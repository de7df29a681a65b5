"""Back to an ordinary model: layers multiplied out, and nothing left for transformers to find."""

import logging

from torch import nn
from transformers import PreTrainedModel

from ..errors import TargetError
from ..formats import LinearFace, is_packed, plain
from ..kinds import succeed
from ..surgery import factorized


logger = logging.getLogger(__name__)


def multiply_out(model):
    """Put dense layers in the place of all factorized ones, biases that were added included."""
    refuse_adapters(model, "call merge_and_unload() or unload()")
    found = factorized(model)
    added = [name for name, kind in found.items() if kind.added_bias(model, name)]
    for name, kind in found.items():
        kind.to_dense(model, name)
    _unpack(model)
    if added:
        logger.warning(
            "%d dense layers, such as %s, now have a bias that the architecture has no place for: the model computes "
            "the same, but loses these biases if it is saved and loaded as a dense model. Keep the factorized "
            "checkpoint for that, or factorize with a method that adds none (`bias_correction=False`).",
            len(added),
            added[0],
        )


def _unpack(model):
    """Put ordinary linears in the place of those that an inner quantizer has packed."""
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module.weight)
    }
    for name, module in packed.items():
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        dense.weight = nn.Parameter(plain(module).detach().contiguous())
        dense.bias = module.bias
        succeed(model, name, dense)


def refuse_adapters(model, cure):
    """Raise [`TargetError`] if a factorized layer of `model` carries adapters."""
    name = next((name for name, module in model.named_modules() if isinstance(module, LinearFace)), None)
    if name is not None:
        raise TargetError(f"{name.removesuffix('.base_layer')} carries adapters; {cure} first.")


def detach(model):
    """Make a model ordinary again, for transformers too."""
    model.hf_quantizer.remove_quantization_config(model)
    unmark(model)


def unmark(model):
    """Let transformers take the weights for ordinary ones, which can be cast."""
    model.is_quantized = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
