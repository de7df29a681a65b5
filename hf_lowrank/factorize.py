"""One planned weight at a time: its error curve, its factors, its tensors."""

import zlib
from contextlib import contextmanager

import torch

from .errors import ConfigError, LowRankError
from .formats import FORMATS
from .linalg import require_finite


def format_for(site, recipe):
    """The name of the format that `site` is stored in.

    Raises:
        ConfigError: the recipe names a format that this sort of layer cannot take.
    """
    wanted, possible = recipe.format or recipe.method.format, site.kind.formats
    if possible is None or wanted in possible:
        return wanted
    if recipe.format is not None:
        raise ConfigError(
            f"`format`={recipe.format!r} cannot hold {site.name}, which can be stored as {list(possible)}; leave "
            "`format` unset, or leave the layer dense with `exclude_modules`."
        )
    if recipe.method.only_format:
        raise ConfigError(
            f"`method`={recipe.method.name!r} makes layers of format {wanted!r}, and {site.name} can be stored as "
            f"{list(possible)} only; leave it dense with `exclude_modules`, or choose another method."
        )
    return possible[0]


def factorize_site(site, weight, rank, recipe, statistics, dtype, anchors=None):
    """Factors of one site, a weight or a group of weights, as named tensors.

    Args:
        site ([`Site`]): where the weight belongs.
        weight (`torch.Tensor`): `(copies, out, in)`.
        rank (`int`): as planned.
        recipe ([`Recipe`]): method, format and compute device.
        statistics ([`Statistics`], *optional*): for methods that need them.
        dtype (`torch.dtype`): of the stored factors.
        anchors (`dict[str, torch.Tensor]`, *optional*): what a comparison with the compressed model gave, for methods
            that are `anchored`.

    Returns:
        `(tensors, shift, relative_error)`: `{full parameter name: tensor}` for the name of each member of the site, on
        the device of `weight`; what `shifted_bias` adds to the bias, float64, or `None`; and the root mean square of
        the relative errors of the copies, `None` where there is no error to speak of.

    Raises:
        LowRankError: numerical trouble, with the name of the site in front.
    """
    factors = site_factors(site, weight, rank, recipe, statistics, anchors)
    with _naming(site):
        errors = [f.relative_error for f in factors]
        error = None if None in errors else (sum(error**2 for error in errors) / len(errors)) ** 0.5
        format, tensors = FORMATS[format_for(site, recipe)], {}
        for member, own in site.kind.parts(site, factors):
            found = member.kind.tensors(member, format, own, dtype)
            if member.name != site.name:
                found = {name: tensor for name, tensor in found.items() if not name.endswith(format.lent)}
            for name, tensor in found.items():
                require_finite(tensor, f"{name} in {dtype}")
            tensors[member.name] = {name: tensor.to(weight.device) for name, tensor in found.items()}
    shift = None if factors[0].shift is None else factors[0].shift.to(weight.device)
    return tensors, shift, error


def shifted_bias(site, bias, shift, dtype):
    """The bias of a factorized layer, cast once: that of the dense layer, if it had one, and the shift `(out,)`."""
    total = shift if bias is None else bias.double() + shift
    require_finite(total.to(dtype), f"{site.name}: the bias in {dtype}")
    return total.to(dtype)


def site_factors(site, weight, rank, recipe, statistics, anchors=None):
    """One [`Factors`] for each copy in `weight` `(copies, out, in)`; other arguments as in `factorize_site`."""
    device = _device_for(recipe, weight)
    with _naming(site):
        stats = _stats_of(site, recipe.method.statistics, statistics, device)
        stats.update((name, tensor.to(device)) for name, tensor in (anchors or {}).items())
        if recipe.method.initialises:
            # By its name, a layer draws the same numbers whichever others there are.
            stats["seed"] = zlib.crc32(f"{recipe.seed} {site.name}".encode())
        return [recipe.method.factorize(copy.to(device), rank, stats) for copy in weight]


def measure_site(site, weight, recipe, statistics):
    """The curve that the allocator asks for of one site, over all of its copies.

    Returns:
        `(min(out, in) + 1,)`, float64, on the CPU: the squared error, or with an allocator that is `first_order` the
        predicted change of the loss, at every rank from 0, the zero matrix, on.
    """
    method, device = recipe.method, _device_for(recipe, weight)
    total = torch.zeros(min(site.out_features, site.in_features) + 1, dtype=torch.float64)
    with _naming(site):
        stats = _stats_of(site, recipe.statistics, statistics, device)
        measure = method.loss_curve if recipe.first_order else method.error_curve
        for copy in weight:
            total += measure(copy.to(device), stats).cpu()
    # Statistics are of the tokens of all copies, each of which sees its part of them.
    return total / site.copies if method.statistics else total


@contextmanager
def _naming(site):
    """Errors inside come out with the name of the site in front, those of a group with all its names."""
    try:
        yield
    except LowRankError as error:
        raise type(error)(f"{' + '.join(member.name for member in site.members)}: {error}") from error


def _device_for(recipe, weight):
    return torch.device(recipe.compute_device) if recipe.compute_device else weight.device


def _stats_of(site, names, statistics, device):
    if not names:
        return {}
    found = statistics.joint([member.name for member in site.members], names)
    return {name: tensor.to(device) for name, tensor in found.items()}
