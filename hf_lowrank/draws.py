"""What is drawn for a training step: which of two things a layer computes, or a number out of a pack."""

import torch


class TwoBranches:
    """Mixin of layers with a full-rank weight and low-rank factors for the same map.

    `drawn` is what the layer computes in training mode: the full-rank branch if `True`, the factors if `False`,
    nothing before the first draw (`None`). In evaluation mode the factors count, whatever was drawn.
    """

    drawn = None


def two_branch_layers(model):
    """`{name: layer}` of the layers of `model` that have two branches, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TwoBranches)}


def draws(count, probability, seed, step, turn=0):
    r"""Independent Bernoulli draws that nothing but the arguments decides.

        z_i = [u_i < p],    u ~ U[0, 1) from the generator with the seed 1000003 seed + step

    Args:
        count (`int`): how many.
        probability (`float`): of `True`, in [0, 1]; the ends are exact.
        seed (`int`): of the run.
        step (`int`): optimizer steps made before.
        turn (`int`, defaults to 0): 0 or 1, which of two independent draws of the same step.

    Returns:
        `list[bool]`
    """
    generator = torch.Generator().manual_seed((1000003 * seed + step) % 2**63)
    numbers = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return (numbers[turn] < probability).tolist()


def draw(model, probability, seed, step, turn=0):
    """Draw a branch for every layer of `model` that has two; arguments as for [`draws`].

    In a training loop of your own, call it before each step. The same arguments give the same branches in every
    process, whatever was drawn before.
    """
    layers = two_branch_layers(model).values()
    for layer, drawn in zip(layers, draws(len(layers), probability, seed, step, turn), strict=True):
        layer.drawn = drawn


def deal(count, turn, *seeds):
    """The entry `turn` of an endless series of `range(count)` without replacement, shuffled anew after `count` turns.

    Args:
        count (`int`): how many different numbers, at least 1.
        turn (`int`): which entry, from 0 on.
        *seeds (`int`): what else the series depends on.

    Returns:
        `int`: from 0 to `count` - 1; every `count` turns in a row, from a multiple of `count` on, have each of them.
    """
    mixed = 0
    for seed in (*seeds, turn // count):
        mixed = 1000003 * mixed + seed
    # The generator reads the lower 32 bits of its seed.
    generator = torch.Generator().manual_seed((mixed ^ mixed >> 32) % 2**32)
    return int(torch.randperm(count, generator=generator)[turn % count])
