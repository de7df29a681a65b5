"""Train a small part of a factorized model: the weight of each component, the factors, or some of them."""

from functools import partial

from ...errors import ConfigError, TargetError
from ...formats import FormatLinear, LinearFace, LowRankLinear, SharedBasisLinear, TensorTrainLinear, is_packed
from ...surgery import factorized
from .require import require_peft


PARTS = ("singular_values", "factors", "auxiliary")


def train_only(model, part="singular_values", adapter_name="default"):
    r"""Freeze a factorized model but for one part of its factorized layers.

        y = left diag(s) right x + b,    s = 1 at the start,    s (r,) trainable        (`part="singular_values"`)

    With factors by `"svd"`, `s` scales the singular values of the weight; with those of `"whitened_svd"` or
    `"kfac_svd"`, the singular values of the weight as its inputs or the loss see it.

    That is PEFT's IA3 on the input of every `left`, so it is IA3: `print_trainable_parameters()` counts,
    `save_pretrained()` writes r numbers a layer, `PeftModel.from_pretrained` loads them onto the same factors with
    stock PEFT, and `merge_and_unload()` folds `s` into `left`, with ranks and sizes as before.

    Factors are not a small part, and PEFT would keep a second copy of them. With `part="factors"` they are trained
    where they are, and saved with the model. `part="auxiliary"` is the light form of that for tensor trains: their
    central core, the largest one, stays as it is. At full bonds it has as many numbers as the weight, and the others
    together 7.3 % of all of 768 x 3072 and 11.1 % of 768 x 768 in the shapes of MPOP.

    Args:
        model (`torch.nn.Module`): factorized, without adapters.
        part (`str`, defaults to `"singular_values"`): or `"factors"`: everything that stands for dense weights, of
            experts too; or `"auxiliary"`: all cores of `tensor_train` layers but the central ones. Biases, norms and
            embeddings stay frozen.
        adapter_name (`str`, defaults to `"default"`): of the IA3 adapter.

    Returns:
        A `PeftModel` for `"singular_values"`, else `model` itself. `print_trainable_parameters()` counts either, where
        PEFT is installed.

    Raises:
        ConfigError: another part.
        TargetError: no factorized layer, one with adapters, quantized factors to be trained, or a layer that has no
            singular values (`"pivoted"`) or no cores.

    Reference:
        Basel (2405.15877, TMLR 2025) and, from memory, SVFT tune singular values. Differs: both start from the SVD of
        the dense weight, and Basel prunes and adds bases on the way, as [`BasisSelectionCallback`] does. Auxiliary
        tensors: MPOP, ACL 2021, which names 91 % fewer trained parameters.
    """
    if part not in PARTS:
        raise ConfigError(f"`part`={part!r} of train_only is not one of {list(PARTS)}.")
    sites = factorized(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FormatLinear)}
    if not sites or (part == "singular_values" and not layers):
        raise TargetError("The model has no factorized layer to train; call hf_lowrank.factorize(model) first.")
    for name, layer in layers.items():
        if isinstance(layer, LinearFace):
            raise TargetError(f"{name} carries adapters; call `merge_and_unload()` or `unload()` first.")
    if part == "factors":
        return _trained_in_place(model, [t for name, kind in sites.items() for t in kind.stored(model, name).values()])
    if part == "auxiliary":
        for name in sites:
            if not isinstance(layers.get(name), TensorTrainLinear):
                raise TargetError(
                    f"{name} is stored as {getattr(layers.get(name), 'name', 'low_rank')!r}, not as a chain with a "
                    "central core; factorize the dense model with method='tensor_train'."
                )
        return _trained_in_place(model, [t for layer in layers.values() for t in layer.auxiliary()])
    peft = require_peft("train_only")
    for name, layer in layers.items():
        if not isinstance(layer, (LowRankLinear, SharedBasisLinear)):
            raise TargetError(
                f"{name} is stored as {layer.name!r}, not by components with a weight each; call "
                "hf_lowrank.truncate(model, format='low_rank') first, and save the model for the adapter to belong to."
            )
    targets = [f"{name}.left" for name in layers]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=targets)
    return peft.get_peft_model(model, config, adapter_name=adapter_name)


def _trained_in_place(model, tensors):
    """`model` with everything frozen but the numbers among `tensors`."""
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not numbers or any(map(is_packed, numbers)):
        raise TargetError(
            "The factors are quantized, and cannot be trained where they are; train them before they are quantized, "
            "or take `part`='singular_values'."
        )
    model.requires_grad_(False)
    for tensor in numbers:
        tensor.requires_grad_(True)
    try:
        from peft import PeftModel
    except ImportError:
        return model
    for name in ("get_nb_trainable_parameters", "print_trainable_parameters"):
        setattr(model, name, partial(getattr(PeftModel, name), model))
    return model
