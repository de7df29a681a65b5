from dataclasses import dataclass

import torch

from ..blocks import block_names, first_calls
from ..formats import FormatLinear, PivotedLinear
from ..kinds import kind_of
from ..statistics.collect import call_arguments, prepared
from ._linears import check_arguments, fixed_parameters, is_plain, linear_maps, shape_of
from ._trial import Trial, connected, holds


@dataclass(frozen=True)
class Fold:
    """Channels that can be reordered.

    Args:
        producers (`list[str]`): the layers that put them out.
        consumers (`list[str]`): the layers that read them, after nothing but elementwise operations.
        leader (`str`): the pivoted producer whose order they take.
    """

    producers: list
    consumers: list
    leader: str


def fold_order(model, inputs):
    r"""Take the gather out of pivoted layers, in place, wherever the layers that read their outputs can be reordered.

        W_2 f(W_1 x + b_1) = (W_2 P^T) f(P W_1 x + P b_1)    for every permutation P and elementwise f

    With P the order of a [`PivotedLinear`], `P W_1` comes pivots first and needs no gather and no stored order. Layers
    that are combined with it element by element (gate and up) take the same order; a pivoted one among them keeps a
    gather. Which layers belong together is found by running each repeated block on `inputs`: a layer is
    reordered only if changing its outputs changes what the next linear reads channel by channel, and if the very
    reordering leaves all that the block returns unchanged. So outputs that are added to a residual stream, rotated
    or split into heads stay in their order.

    Needs memory for a float32 copy of one block. Fold before an optimizer is built and before adapters are trained:
    parameters keep their identity, but gradients are dropped, and states of an optimizer or adapters that were saved
    earlier would belong to other channels.

    Args:
        model (`torch.nn.Module`): with pivoted layers; all of it in memory.
        inputs (`dict`): one batch, as a tokenizer or processor makes it; a few tokens are enough. Blocks and experts
            that it does not reach stay as they are.

    Returns:
        `int`: how many gathers are gone; 0 where no layer could be folded, or all are folded already.

    Raises:
        ConfigError: `model` is not a module.
        CalibrationError: `inputs` is not a dict of tensors.
        LowRankError: some weights are not in memory.

    Reference:
        The order is that of PIFA (biomedical-cybernetics/pivoting-factorization, ICML 2025). Derived here: finding
        by trial where it can be folded.
    """
    check_arguments(model, inputs)
    blocks = block_names(model, [name for name, module in model.named_modules() if _has_gather(module)])
    if not blocks:
        return 0
    with prepared(model, backward=False):
        calls = first_calls(model, blocks, lambda: model(**call_arguments(model, inputs)))
    fixed = fixed_parameters(model)
    # All folds are known before the first layer is touched; each by itself leaves what the model computes as it is.
    folds = [fold for name in calls for fold in _find(name, model.get_submodule(name), calls[name], fixed)]
    for fold in folds:
        _apply(model, fold)
    return len(folds)


def _has_gather(module):
    return isinstance(module, PivotedLinear) and not module.pivots_first


def _outputs(layer):
    """`{name: dimension}` of the tensors of `layer` that have one entry an output; empty if it cannot be reordered."""
    if isinstance(layer, FormatLinear):
        return dict.fromkeys(layer.output_rows, 0)
    return {"weight": 1 if kind_of(layer).transposed else 0, "bias": 0}


def _inputs(layer):
    """`{name: dimension}` of the tensors of `layer` that have one entry an input; empty if it cannot be reordered."""
    if isinstance(layer, FormatLinear):
        return dict.fromkeys(layer.input_columns, 1)
    return {"weight": 0 if kind_of(layer).transposed else 1}


def _find(prefix, block, call, fixed):
    """The [`Fold`]s of one block, called `prefix`, which `call` is a call of."""
    linears = linear_maps(block)
    shapes = {name: shape_of(layer) for name, layer in linears.items()}
    sizes = {shapes[name][0] for name, layer in linears.items() if _has_gather(layer)}
    consumers = [name for name in linears if shapes[name][1] in sizes]
    producers = [name for name in linears if any(shapes[name][0] == shapes[reader][1] for reader in consumers)]
    if not consumers:
        return []
    with torch.no_grad():
        trial = Trial(block, *call, consumers)
        before = trial.run()
        found = []
        for names, readers in connected(trial, before, producers, shapes):
            leader = next((name for name in names if _has_gather(linears[name])), None)
            # These channels have the order of another layer already.
            done = any(isinstance(linears[name], PivotedLinear) and linears[name].pivots_first for name in names)
            free = all(is_plain(f"{prefix}.{n}", linears[n], _outputs(linears[n]), fixed) for n in names)
            free = free and all(is_plain(f"{prefix}.{n}", linears[n], _inputs(linears[n]), fixed) for n in readers)
            if leader is None or done or not free:
                continue
            if holds(trial, before, names, readers, linears[leader].order.long().argsort()):
                full = {name: f"{prefix}.{name}" for name in linears}
                found.append(Fold([full[n] for n in names], [full[n] for n in readers], full[leader]))
        return found


def _apply(model, fold):
    """Reorder the layers of `fold`; all new tensors are there before the first is put in."""
    leader = model.get_submodule(fold.leader)
    order = leader.order.long().argsort()
    changes = [
        change
        for names, dimensions in ((fold.producers, _outputs), (fold.consumers, _inputs))
        for name in names
        for change in _reordered(model.get_submodule(name), dimensions, order)
    ]
    for tensor, new in changes:
        tensor.data = new
        tensor.grad = None
    leader.order = None


def _reordered(layer, dimensions, order):
    """`(tensor, what it becomes)` of those that `dimensions` names, `None` (no bias) left out."""
    state = layer.state_dict(keep_vars=True)
    return [
        (state[name], state[name].detach().index_select(dimension, order.to(state[name].device)))
        for name, dimension in dimensions(layer).items()
        if name in state
    ]
