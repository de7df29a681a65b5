"""A block run again with some of its channels changed, to see what depends on them."""

import copy
from contextlib import ExitStack

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..formats import FormatLinear


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
