"""Give a factorized layer another weight, in place and as it stands: exactly, or at a lower rank."""

import warnings

import torch
from torch import nn

from .errors import ComputedWeightError
from .formats import FORMATS, exact_factors
from .linalg import Terms, flat_places, require_finite, sparse_matrix
from .methods import Factors


# What every module has; the rest of its attributes describe the layer itself.
COMMON = frozenset(vars(nn.Module()))
TABLES = ("_parameters", "_buffers", "_modules")


def snapshot(layers):
    """All that `layers` are made of, by reference; [`restore`] brings back these very tensors."""
    modules = {module for layer in layers for module in layer.modules()}
    return [
        (
            module,
            {table: dict(getattr(module, table)) for table in TABLES},
            {key: value for key, value in vars(module).items() if key not in COMMON},
        )
        for module in modules
    ]


def restore(saved):
    """Undo whatever happened to the layers since [`snapshot`], but for moves to another device or dtype."""
    for module, tables, attributes in saved:
        parameters, buffers = (tables[name] for name in ("_parameters", "_buffers"))
        for name, parameter in parameters.items():
            if parameter is not None:
                parameter.data = _like(parameter.data, module._parameters.get(name))
        buffers = {name: _like(buffer, module._buffers.get(name)) for name, buffer in buffers.items()}
        for table, content in {**tables, "_buffers": buffers}.items():
            _fill(module, table, content)
        vars(module).update(attributes)


def _like(tensor, other):
    """`tensor` where `other` is, and of its dtype if both are floating-point; as it is if either is `None`."""
    if tensor is None or other is None:
        return tensor
    both = tensor.is_floating_point() and other.is_floating_point()
    return tensor.to(other.device, other.dtype if both else tensor.dtype)


def _fill(module, table, content):
    """Make `content` all that a table of `module` holds."""
    getattr(module, table).clear()
    getattr(module, table).update(content)
    for name in content:
        # Where the attribute was None before, it is an ordinary one, which would be found first.
        vars(module).pop(name, None)


def absorb(layer, weight, bias=None, updates=(), peers=()):
    r"""Give `layer` factors whose product is `weight`, of the smallest rank at hand.

    Where `weight` is what `layer` has now plus `updates`, or that with its rows scaled, factors are appended:

        W = diag(c) (L R + sum_i B_i A_i) = [c L, c B_1, ..] [R; A_1; ..]

    Any other weight is decomposed at its numerical rank, at most `min(out, in)`. What a format holds beside two
    factors stays as it is, or has its rows scaled.

    Args:
        layer ([`FormatLinear`]): changed in place; keeps its format, dtype and device.
        weight (`torch.Tensor`): `(out, in)`, in float32 or wider.
        bias (`torch.Tensor`, *optional*): `(out,)`; the present one stays if not given.
        updates (`list[tuple]`, *optional*): pairs `(B_i, A_i)`, `(out, r_i)` and `(r_i, in)`.
        peers (`list[FormatLinear]`, *optional*): layers of the model that may borrow from `layer`. Its basis is handed
            on to them first, so that none of them changes.

    Raises:
        ComputedWeightError: the format cannot hold such a weight, or its factors are quantized, wrapped or offloaded.
        NonFiniteError: the weight, or a factor in the layer's dtype, holds NaN or infinity.
    """
    check_rewritable(layer)
    wide, eps = weight.detach().double(), torch.finfo(weight.dtype).eps
    require_finite(wide, "The merged weight")
    found = _appended(layer, updates, wide, eps)
    if found is None:
        rest = layer.rest()
        found = (*exact_factors(wide if rest is None else wide - rest, eps), rest)
    left, right, rest = found
    before = _numbers(layer)
    replace_factors(layer, left, right, bias, peers, rest)
    if _numbers(layer) >= max(wide.numel(), before + 1):
        warnings.warn(
            "Factorized layers have grown to the size of dense ones, which they compute slower; lower their rank with "
            "hf_lowrank.truncate(model, rank), or call hf_lowrank.to_dense(model).",
            stacklevel=2,
        )


def _numbers(layer):
    """What `layer` stores beside its bias."""
    return sum(tensor.numel() for name, tensor in layer.state_dict().items() if name != layer.bias_name)


def replace_factors(layer, left, right, bias=None, peers=(), rest=None):
    """Put other factors and `rest`, float64, into `layer`; `bias`, `peers` and errors as in [`absorb`]."""
    check_rewritable(layer)
    borrowers = [peer for peer in peers if getattr(peer, "lender", None) is layer]
    format, dtype = FORMATS[layer.name], layer.weight.dtype
    factors = Factors(left, right, 0.0, rest=rest)
    if not _holds(format, factors):
        raise ComputedWeightError(
            f"The format {layer.name!r} cannot hold a given pair of factors exactly; call hf_lowrank.to_dense(model) "
            "before merging."
        )
    made = format.from_factors(factors, layer.bias if bias is None else bias.detach(), dtype, layer.transposed)
    for name, tensor in made.state_dict().items():
        require_finite(tensor, f"`{name}` in {dtype}")
    if borrowers:
        warnings.warn(
            "Layers that share a basis no longer do: each gets its own factors now. hf_lowrank.summary(model) tells "
            "the size.",
            stacklevel=3,
        )
        layer.release(borrowers)
    _adopt(layer, made, any(parameter.requires_grad for parameter in layer.parameters()))
    # What was recorded is the distance to the dense weight before.
    layer.relative_error = None


def check_replaceable(layer):
    """Raise [`ComputedWeightError`] unless `layer` can take any other two factors of the shapes of its own."""
    check_rewritable(layer)
    rest, (left, right) = layer.rest(), layer.factors()
    # A weight of full rank is the product of two factors, too, but of none that could be called its own.
    full = left.shape[1] >= min(layer.dense_shape)
    # Those of its own may be of a kind that others are not: block diagonal, sparse, a Kronecker product.
    generator = torch.Generator().manual_seed(0)
    others = (torch.randn(own.shape, generator=generator, dtype=own.dtype).to(own.device) for own in (left, right))
    if rest is not None or full or not _holds(FORMATS[layer.name], Factors(*others, 0.0)):
        raise ComputedWeightError(
            f"A layer of rank {left.shape[1]} in the format {layer.name!r} is not the product of two factors of lower "
            "rank that may become any others."
        )


def _holds(format, factors):
    """Whether a layer in a format has the weight that `factors` have, in float64."""
    product = factors.product()
    held = format.from_factors(factors, dtype=torch.float64).dense_weight()
    return (held - product).norm() <= 1e-9 * max(factors.left.norm() * factors.right.norm(), product.norm())


def check_rewritable(layer):
    """Raise [`ComputedWeightError`] unless the factors of `layer` are ordinary numbers in ordinary linears."""
    for name, parameter in layer.named_parameters():
        found = None
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            found = f"is a {type(parameter.data).__name__}; merge before the factors are quantized or sharded"
        elif parameter.is_meta:
            found = "is offloaded; load the model without offloading"
        elif not parameter.is_floating_point():
            found = f"is of {parameter.dtype}; merge before the factors are quantized"
        elif any("base_layer" in part for part in name.split(".")):
            found = "belongs to an adapter of the factor itself; merge or delete that one first"
        if found is not None:
            raise ComputedWeightError(f"The factors of a layer cannot be exchanged: `{name}` {found}.")


def _appended(layer, updates, weight, eps):
    """Factors and rest of `weight` by scaling rows and appending `updates`, or `None` if that does not give it."""
    (left, right), rest = layer.factors(), layer.rest()
    left = torch.cat([left, *(b.detach().double() for b, _ in updates)], dim=1)
    right = torch.cat([right, *(a.detach().double() for _, a in updates)])
    if left.shape[1] > min(weight.shape):
        return None
    product = Factors(left, right, 0.0, rest=rest).product()
    squares = product.square().sum(1)
    scale = torch.where(squares > 0, (product * weight).sum(1) / squares.clamp(min=1e-300), 1.0)[:, None]
    # Sums in the precision of `weight` err by some units in the last place.
    tolerance = 8 * eps * weight.norm()
    if not (scale * product - weight).norm() <= tolerance:
        return None
    if (product - weight).norm() <= tolerance:
        return left, right, rest
    if isinstance(rest, Terms):
        # Rows of these cannot be scaled one by one.
        return None
    return scale * left, right, None if rest is None else _scaled(rest, scale[:, 0])


def _scaled(rest, scale):
    """A sparse matrix with its rows scaled, every entry kept."""
    return sparse_matrix(flat_places(rest), rest.values() * scale[rest.indices()[0]], rest.shape)


def _adopt(module, made, trainable):
    """Move all that `made` consists of into `module`, keeping the modules that stay of the same class."""
    for name, value in made._parameters.items():
        before = module._parameters.get(name)
        if value is not None:
            value.requires_grad_(trainable if before is None else before.requires_grad)
    children = {}
    for name, child in made._modules.items():
        own = module._modules.get(name)
        children[name] = child
        if own is not None and type(own) is type(child):
            _adopt(own, child, trainable)
            children[name] = own
    for table, content in zip(TABLES, (made._parameters, made._buffers, children), strict=True):
        _fill(module, table, content)
    kept = COMMON | {"added_bias", "replaced_shape"}
    vars(module).update({key: value for key, value in vars(made).items() if key not in kept})
