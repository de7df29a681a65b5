"""Convolutions as linear maps of patches: how their kernels are read, watched and replaced."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from .errors import CheckpointError, ConfigError, RankError
from .formats import LowRankConv
from .formats.conv import CONVOLUTIONS
from .kinds import LinearKind, Site, register_linear_kind, succeed


@dataclass(frozen=True)
class ConvSite(Site):
    """One kernel; its matrix has a row an output channel and a column a channel and place of the patch.

    Args:
        kernel_size (`tuple[int]`): of one to three dimensions.
    """

    kernel_size: tuple = ()


class ConvKind(LinearKind):
    """Convolutions of one dimensionality; the groups of a grouped one are copies, with factors of their own."""

    # Code for whole linears must not find them.
    single = False
    convolution = True
    formats = (LowRankConv.name,)
    takes_shift = False

    def matches(self, module):
        weight = module._parameters.get("weight") if type(module) is self.cls else None
        return weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter)

    def sites(self, name, module):
        groups = module.groups
        rows, columns = module.out_channels // groups, module.weight[0].numel()
        return [ConvSite(name, self, rows, columns, module.bias is not None, groups, tuple(module.kernel_size))]

    def oriented(self, model, site, weight):
        return weight.reshape(site.copies, site.out_features, site.in_features)

    def skeleton(self, model, site, spec, dtype):
        if spec["format"] not in self.formats:
            raise CheckpointError(
                f"The checkpoint stores {site.name} as {spec['format']!r}; convolutions can be {list(self.formats)}."
            )
        dense = model.get_submodule(site.name)
        try:
            layer = LowRankConv.like(dense, spec.get("rank"), dtype=dtype)
        except RankError as error:
            raise RankError(f"{site.name}: {error}") from error
        layer.relative_error = spec.get("relative_error")
        succeed(model, site.name, layer)

    def placeholders(self, model, site, dtype):
        layer = model.get_submodule(site.name)
        # Not register_parameter: the names are properties of the layer.
        layer._parameters["weight"] = nn.Parameter(torch.empty(layer.dense_shape, device="meta", dtype=dtype))
        if site.bias:
            layer._parameters["bias"] = nn.Parameter(torch.empty(layer.dense_shape[0], device="meta", dtype=dtype))
        return {f"{site.name}.{leaf}": leaf for leaf in ("weight", "bias")[: 1 + site.bias]}

    def tensors(self, site, format, factors, dtype):
        made = LowRankConv.tensors(factors, site.kernel_size, dtype)
        return {f"{site.name}.{key}": tensor for key, tensor in made.items()}

    def bias_name(self, site, format):
        return f"{site.name}.{LowRankConv.bias_name}"

    def spec(self, model, name):
        return model.get_submodule(name).spec()

    def factors(self, model, name):
        return [(left.detach().double(), right.detach().double()) for left, right in model.get_submodule(name).pairs()]

    def dense_shape(self, model, name):
        layer = model.get_submodule(name)
        return layer.groups, layer.out_features, layer.in_features

    def to_dense(self, model, name):
        layer = model.get_submodule(name)
        trainable = any(p.requires_grad for p in self.stored(model, name).values())
        dense = layer.empty_dense()
        dense.weight = nn.Parameter(layer.dense_weight().detach().contiguous(), requires_grad=trainable)
        dense.bias = layer.bias
        succeed(model, name, dense)

    @contextmanager
    def watch(self, model, sites, observe):
        (site,) = sites
        if site.copies > 1:
            raise ConfigError(
                f"{site.name} is a convolution of {site.copies} groups, each of which sees other inputs; statistics "
                "are not kept apart for them. Use a method without statistics (`method='svd'`), or leave it dense "
                "with `exclude_modules`."
            )

        def observed(module, args, kwargs, output):
            (inputs,) = [*args, *kwargs.values()]
            # The rows are put in the place of the output, so that gradients pass through them.
            rows = output.movedim(-len(site.kernel_size) - 1, -1)
            observe(site.name, patches(module, inputs), rows)
            return rows.movedim(-1, -len(site.kernel_size) - 1)

        handle = model.get_submodule(site.name).register_forward_hook(observed, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def patches(conv, inputs):
    """What a convolution without groups multiplies its kernel with, `(..., *places, channels * prod(kernel_size))`.

    Args:
        conv (`torch.nn.Module`): a convolution of one to three dimensions.
        inputs (`torch.Tensor`): `(..., channels, *sizes)`.
    """
    sizes = list(zip(conv.kernel_size, conv.dilation, strict=True))
    if conv.padding == "valid":
        widths = [(0, 0) for _ in sizes]
    elif conv.padding == "same":
        # torch puts the odd one at the end.
        widths = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in sizes]
    else:
        widths = [(width, width) for width in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(width for pair in widths for width in pair):
        inputs = pad(inputs, [width for pair in reversed(widths) for width in pair], mode=mode)
    first = inputs.ndim - len(sizes)
    for axis, ((kernel, dilation), stride) in enumerate(zip(sizes, conv.stride, strict=True)):
        # A new last dimension with the places of the kernel along this axis.
        inputs = inputs.unfold(first + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return inputs.movedim(first - 1, first - 1 + len(sizes)).flatten(-len(sizes) - 1)


KINDS = {cls: ConvKind(cls) for cls in CONVOLUTIONS.values()}
for kind in KINDS.values():
    register_linear_kind(kind)


def conv_kind(layer):
    """The kind that a factorized convolution goes back to."""
    return KINDS[type(layer.right)]
