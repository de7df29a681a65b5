"""A block run again with some of its channels changed, to see what depends on them."""

import copy
import math
from contextlib import ExitStack

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..formats import FormatLinear


# A reordering that is undone may change a block by roundings only: by this much of what it changes if not undone.
UNCHANGED = 1e-5


def lender_of(module):
    """The layer that `module` borrows parameters from, or `None`."""
    return getattr(module, "lender", None) if isinstance(module, FormatLinear) else None


class Trial:
    """A copy of a block, in eval mode and in float32 or wider, that can be run with changed channels.

    Args:
        block (`torch.nn.Module`): left as it is.
        args (`tuple`): positional arguments of one call.
        kwargs (`dict`): keyword arguments of the same call.
        watched (`list[str]`): modules in `block` whose inputs are noted.
    """

    def __init__(self, block, args, kwargs, watched):
        double = any(parameter.dtype == torch.float64 for parameter in block.parameters())
        # In half precision, one rounding would look like a dependence.
        self.dtype = torch.float64 if double else torch.float32
        self.block = copy.deepcopy(block).eval().to(self.dtype)
        for module in self.block.modules():
            # A lender may stand outside of the block.
            if lender_of(module) is not None:
                lender_of(module).to(self.dtype)
        self.arguments = tree_map_only(torch.Tensor, self._cast, (args, kwargs))
        self.watched = watched

    def _cast(self, tensor):
        return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).detach()

    def run(self, outputs=None, inputs=None):
        """`([tensors that the block returns], {watched module: [its input, call by call]})`.

        Args:
            outputs (`dict[str, Callable]`, *optional*): what to make of the outputs of modules.
            inputs (`dict[str, Callable]`, *optional*): what to make of the inputs of watched modules; these are noted
                as they are after that.
        """
        seen = {name: [] for name in self.watched}

        def reads(name):
            change = (inputs or {}).get(name, lambda x: x)

            def hook(module, args):
                # A linear called by keyword is not watched, so that nothing is known of it.
                if args:
                    seen[name].append(change(args[0]))
                    return (seen[name][-1], *args[1:])

            return hook

        def makes(change):
            return lambda module, args, output: change(output)

        with ExitStack() as stack:
            for name in self.watched:
                handle = self.block.get_submodule(name).register_forward_pre_hook(reads(name))
                stack.callback(handle.remove)
            for name, change in (outputs or {}).items():
                handle = self.block.get_submodule(name).register_forward_hook(makes(change))
                stack.callback(handle.remove)
            # A block may write into what it is given.
            args, kwargs = copy.deepcopy(self.arguments)
            made = tree_leaves(self.block(*args, **kwargs))
        return [tensor for tensor in made if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()], seen


def connected(trial, before, producers, shapes):
    """`[(producers, consumers)]` that have channels in common: all that a change of any of them reaches."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for name in producers:
        out_features = shapes[name][0]
        half = torch.zeros(out_features, dtype=torch.bool)
        half[torch.randperm(out_features, generator=generator)[: out_features // 2]] = True

        def double(output, half=half):
            return torch.where(half.to(output.device), 2 * output, output)

        _, seen = trial.run({name: double})
        reached = set()
        for reader, inputs in seen.items():
            if shapes[reader][1] == out_features and reader != name:
                changed = _changed(before[1][reader], inputs)
                if changed is not None and changed.any() and not (changed & ~half.to(changed.device)).any():
                    reached.add(reader)
        if reached:
            joined = [group for group in groups if group[1] & reached]
            groups = [group for group in groups if not group[1] & reached]
            groups.append(([n for g in joined for n in g[0]] + [name], reached.union(*(g[1] for g in joined))))
    return [(names, [name for name in trial.watched if name in readers]) for names, readers in groups]


def _changed(before, after):
    """Which channels of some inputs differ, `(in,)`; `None` where they are not the same calls."""
    if not before or [x.shape for x in before] != [x.shape for x in after]:
        return None
    different = [(a != b).flatten(0, -2).any(0) for a, b in zip(before, after, strict=True)]
    return torch.stack(different).any(0)


def holds(trial, before, producers, consumers, order):
    """Whether `order` of the outputs of `producers`, undone in front of `consumers`, changes nothing else."""

    def reorder(tensor):
        return tensor[..., order.to(tensor.device)]

    def restore(tensor):
        return tensor[..., order.argsort().to(tensor.device)]

    reordered = dict.fromkeys(producers, reorder)
    undone = trial.run(reordered, dict.fromkeys(consumers, restore))
    # Where this is no change either, nothing was tried.
    left = trial.run(reordered)
    compared = [(before[0], undone[0], left[0])]
    compared += [(before[1][name], undone[1][name], left[1][name]) for name in consumers]
    return all(
        0 < _distance(a, c) < math.inf and _distance(a, b) <= UNCHANGED * _distance(a, c) for a, b, c in compared
    )


def same(before, after):
    """Whether tensors, one by one, are the same but for roundings."""
    size = math.sqrt(sum(tensor.square().sum().item() for tensor in before))
    return _distance(before, after) <= UNCHANGED * size


def _distance(before, after):
    if [x.shape for x in before] != [x.shape for x in after]:
        return math.inf
    return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(before, after, strict=True)))
