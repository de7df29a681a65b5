"""The repeated blocks of a model, found by structure, and what each is called with."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import ConfigError


@dataclass
class Call:
    """One call of a block, without the hidden state that enters it.

    Args:
        name (`str`): the block.
        args (`tuple`): positional arguments after the hidden state.
        kwargs (`dict`): keyword arguments; the hidden state among them where it was given by keyword.
        keyword (`str`, *optional*): name of the hidden state where it was given by keyword.
    """

    name: str
    args: tuple
    kwargs: dict
    keyword: str | None

    def __call__(self, block, hidden):
        """The hidden state that `block` makes of `hidden`."""
        if self.keyword is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{**self.kwargs, self.keyword: hidden}))


@dataclass
class Chain:
    """Blocks of which each reads what the one before has made.

    Args:
        names (`list[str]`): the blocks, in order.
        inputs (`list[torch.Tensor]`): what enters a block, the first one to begin with, batch by batch.
        calls (`list[dict[str, Call]]`): what else each block is given, batch by batch.
    """

    names: list
    inputs: list = field(default_factory=list)
    calls: list = field(default_factory=list)

    def advance(self, block, name):
        """Replace what enters the block `name` by what `block` makes of it."""
        for index, calls in enumerate(self.calls):
            self.inputs[index] = calls[name](block, self.inputs[index])


class _Reached(Exception):
    """Ends a forward pass that has seen enough."""


def block_names(model, inside):
    """Names of the repeated blocks that hold any of the modules `inside`: members of the outermost module lists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [f"{name}.{index}" for name in outermost for index in range(len(model.get_submodule(name)))]
    return [block for block in blocks if any(name.startswith(f"{block}.") for name in inside)]


def hidden_of(output):
    """The hidden state in what a block returns: the tensor, or the first of several."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_hidden(output, hidden):
    """What a block returns, with another hidden state in it."""
    return hidden if isinstance(output, torch.Tensor) else type(output)((hidden, *output[1:]))


def split_call(name, args, kwargs):
    """`(Call, hidden state)` of what the block `name` is called with."""
    keyword = None if args else next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor))
    return Call(name, args[1:], kwargs, keyword), args[0] if keyword is None else kwargs[keyword]


def find_chains(model, names, run, cure="leave `refine` unset"):
    """The order in which blocks run, cut where one does not read what the one before has made.

    Args:
        model (`torch.nn.Module`): the model.
        names (`list[str]`): its blocks.
        run (`Callable[[], None]`): a forward pass.
        cure (`str`, *optional*): what the error advises.

    Returns:
        `list[Chain]` without calls.

    Raises:
        ConfigError: a block that runs several times in a forward pass.
    """
    found = []
    made = None

    def observe(call, hidden, output):
        nonlocal made
        if any(call.name in chain.names for chain in found):
            raise ConfigError(
                f"{call.name} runs more than once in a forward pass, so that it cannot be treated by itself; {cure}."
            )
        if made is None or hidden is not made:
            found.append(Chain([]))
        found[-1].names.append(call.name)
        made = output

    with _watching(model, names, observe):
        run()
    return found


def record(model, chain, runs):
    """Run `model` until the last block of `chain`, and note what its blocks are called with.

    Args:
        model (`torch.nn.Module`): the model.
        chain ([`Chain`]): where inputs and calls are added.
        runs (`Iterable[Callable[[], None]]`): forward passes, one a batch.

    Returns:
        `chain`.
    """
    calls = {}

    def observe(call, hidden, output):
        if call.name == chain.names[0]:
            chain.inputs.append(hidden)
        calls[call.name] = call
        if call.name == chain.names[-1]:
            raise _Reached

    with _watching(model, chain.names, observe):
        for run in runs:
            calls = {}
            try:
                run()
            except _Reached:
                pass
            chain.calls.append(calls)
    return chain


def first_calls(model, names, run):
    """`{name: (args, kwargs)}` of the first call of each block that `run`, a forward pass, reaches."""
    found = {}

    def hook(name):
        def seen(module, args, kwargs):
            found.setdefault(name, (args, kwargs))

        return seen

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        run()
    return found


def in_dtype(call, hidden, dtype):
    """`(call, hidden)` with every floating tensor in `dtype`."""

    def cast(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(torch.Tensor, cast, (call.args, call.kwargs))
    return Call(call.name, args, kwargs, call.keyword), cast(hidden)


@contextmanager
def _watching(model, names, observe):
    """While open, `observe(call, hidden state read, hidden state made)` is called after each block."""

    def hook(name):
        def seen(module, args, kwargs, output):
            observe(*split_call(name, args, kwargs), hidden_of(output))

        return seen

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
