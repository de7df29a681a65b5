"""One model trained with ordered dropout, at many sizes: which ranks a budget allows, and the cut."""

import torch

from ..checks import check_number, is_integer
from ..errors import ConfigError, RankError, TargetError
from ..integrations import to_dense
from ..kinds import dense_kind
from ..rewrite import replace_factors
from ..surgery import factorized
from ._components import component_layers, importance


def maestro_ranks(model, param_ratio):
    r"""Ranks of a budget, found without training: the least important components go first, of whatever layer.

        importance of component b of a layer = |left[:, b:]|_F |right[b:]|_F / (|left|_F |right|_F)

    A share, so that layers count alike whatever the scale of their weights, which says nothing about the loss: by the
    product itself, which [`MaestroCallback`] compares with its threshold, whole layers of small weights are cut to
    rank 1. Ranks of a smaller budget are never higher. The model is left as it is: copy it, and give the copy and the
    ranks to [`keep_leading`].

    Args:
        model (`torch.nn.Module`): with `low_rank` layers whose components are in order of importance.
        param_ratio (`float`): parameters kept / parameters of these layers if they were dense, in (0, 1]. A layer
            whose factors would not be smaller counts as dense.

    Returns:
        `dict[str, int]`: the rank of every `low_rank` layer, by name; the one it has where it becomes dense.

    Raises:
        ConfigError: a ratio out of range, or below that of rank 1 everywhere.
        TargetError: no `low_rank` layer, or one that carries adapters.

    Reference:
        Maestro, 2308.14929, ICML 2024, exports by a greedy search; ordering by this share is reconstructed.
    """
    check_number("param_ratio", param_ratio, 0, 1, open_low=True)
    layers = _layers(model)
    budget = param_ratio * sum(layer.out_features * layer.in_features for layer in layers.values())
    order = sorted(
        (value, -rank, name)
        for name, layer in layers.items()
        for rank, value in enumerate(_shares(layer), 1)
        if rank > 1
    )
    ranks = {name: layer.rank for name, layer in layers.items()}
    kept = sum(_cost(layer, layer.rank) for layer in layers.values())
    for _, _, name in order:
        if kept <= budget:
            break
        kept += _cost(layers[name], ranks[name] - 1) - _cost(layers[name], ranks[name])
        ranks[name] -= 1
    if kept > budget:
        raise ConfigError(
            f"`param_ratio`={param_ratio!r} is out of reach: rank 1 everywhere keeps {kept} parameters, and the "
            f"budget is {int(budget)}; raise it."
        )
    # Components of a layer that becomes dense cost nothing.
    return {name: rank if rank < _break_even(layers[name]) else layers[name].rank for name, rank in ranks.items()}


def keep_leading(model, ranks):
    """Keep the leading components of some layers, in place; a layer becomes dense where that is not larger.

    Unlike [`truncate`], which finds the best factors of a lower rank for the weight, this takes those that were
    trained for the rank: after ordered dropout, they know of the data.

    Args:
        model (`torch.nn.Module`): with `low_rank` layers whose components are in order of importance.
        ranks (`dict[str, int]`): by full name, from 1 to the rank the layer has; as [`maestro_ranks`] gives them.

    Returns:
        The same model; transformers models can be saved, and load with plain `from_pretrained`.

    Raises:
        TargetError: no `low_rank` layer, a name that is none, or a layer that carries adapters.
        RankError: a rank out of range.
    """
    layers = _layers(model)
    for name, rank in ranks.items():
        if name not in layers:
            raise TargetError(
                f"`ranks` has {name!r}, which is no `low_rank` layer; there are {len(layers)}, such as "
                f"{next(iter(layers))}."
            )
        if not is_integer(rank, 1) or rank > layers[name].rank:
            raise RankError(f"`ranks`[{name!r}]={rank!r} must be an integer in 1..{layers[name].rank}, its rank.")
    for name, rank in ranks.items():
        layer = layers[name]
        if rank < layer.rank:
            left, right = layer.factors()
            replace_factors(layer, left[:, :rank], right[:rank])
        if rank >= _break_even(layer):
            dense_kind(layer).to_dense(model, name)
    # What is dense altogether is an ordinary model, for transformers too.
    return model if factorized(model) else to_dense(model)


def _shares(layer):
    found = importance(layer).double()
    return (found / found[0].clamp(min=torch.finfo(found.dtype).tiny)).tolist()


def _layers(model):
    layers = component_layers(model)
    if not layers:
        raise TargetError(
            f"This {type(model).__name__} has no `low_rank` layer; factorize it with format='low_rank', or train it "
            "with MaestroCallback(final_prune=False)."
        )
    return layers


def _break_even(layer):
    return layer.break_even(layer.out_features, layer.in_features)


def _cost(layer, rank):
    """Parameters of a layer at a rank, or dense."""
    return min(layer.cost(layer.out_features, layer.in_features, rank), layer.out_features * layer.in_features)
