"""What can be factorized, one weight at a time: where it is, and how its sort of module is read and replaced."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .checks import is_integer
from .errors import DAMAGED, CheckpointError, RankError
from .formats import FORMATS


# Where a module keeps the hooks that run with it, and of which sort the backward ones are; those of its state dict are
# about its own parameters.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class Site:
    """One weight that can be factorized.

    Args:
        name (`str`): dotted name; of the module, or of the parameter where one module holds several weights.
        kind ([`LinearKind`]): how to read, watch and replace it.
        out_features (`int`): rows of the weight, whatever its layout in memory.
        in_features (`int`): columns of the weight.
        bias (`bool`): whether it carries a bias.
        copies (`int`, defaults to 1): weights of this shape stored together (experts).
    """

    name: str
    kind: "LinearKind" = field(repr=False)
    out_features: int = 0
    in_features: int = 0
    bias: bool = False
    copies: int = 1

    @property
    def weight_name(self):
        """Full name of the dense parameter."""
        return self.kind.weight_name(self.name)

    @property
    def owner(self):
        """Name of the module that holds the weight."""
        return self.weight_name.rpartition(".")[0]

    @property
    def members(self):
        """The sites whose weights are factorized as one: this one, unless it is a group."""
        return (self,)


class LinearKind:
    """How one sort of module stores linear maps. This base handles modules that hold exactly one.

    Args:
        cls (`type`): the module class; subclasses are not matched, since they may compute something else.
        transposed (`bool`): the weight is stored as `(in, out)`.
    """

    # Whether a site is a whole linear module; experts keep several sites in one, and convolutions see patches.
    single = True
    # Whether inputs are not rows, but rows are cut out of them.
    convolution = False
    # The grouped kernels of experts want aligned rows; plain linears take any rank.
    min_rank_multiple = 1
    # Formats that can hold such a site; None for all.
    formats = None
    # Whether a bias can be changed, or added where there is none.
    takes_shift = True

    def __init__(self, cls, transposed=False):
        self.cls = cls
        self.transposed = transposed

    def matches(self, module):
        """Whether `module` is of this kind and still dense."""
        # A weight that is computed (weight norm, parametrizations) is not the module's own.
        weight = module._parameters.get("weight") if type(module) is self.cls else None
        return weight is not None and weight.ndim == 2

    def sites(self, name, module):
        """The sites in `module`, which is called `name`."""
        shape = module.weight.shape[::-1] if self.transposed else module.weight.shape
        return [Site(name, self, *shape, bias=module.bias is not None)]

    def weight_name(self, name):
        """Full name of the dense parameter of the site `name`."""
        return f"{name}.weight"

    def weight(self, model, site):
        """The dense weight as `(copies, out, in)`."""
        return self.oriented(model, site, model.get_submodule(site.name).weight.detach())

    def oriented(self, model, site, weight):
        """A dense weight in its own layout as `(copies, out, in)`."""
        return (weight.T if self.transposed else weight)[None]

    def joined(self, weights):
        """One weight `(copies, out, in)` from those of the members of a site; a single one stays as it is."""
        (weight,) = weights
        return weight

    def bias(self, model, site):
        """The bias of the dense layer where the factorized layer keeps it elsewhere, or `None`."""
        return model.get_submodule(site.name).bias

    def skeleton(self, model, site, spec, dtype):
        """Put an empty module in the format `spec` describes, on the meta device, into `model`."""
        format = FORMATS[spec["format"]]
        added = spec.get("bias") is True and not site.bias
        out_features, in_features = _widths(spec, site)
        try:
            layer = format.from_spec(
                spec,
                in_features,
                out_features,
                site.bias or added,
                transposed=self.transposed,
                device="meta",
                dtype=dtype,
            )
        except RankError as error:
            raise RankError(f"{site.name}: {error}") from error
        layer.relative_error = spec.get("relative_error")
        layer.added_bias = added
        layer.replaced_shape = site.out_features, site.in_features
        succeed(model, site.name, layer)

    def placeholders(self, model, site, dtype):
        """Give the factorized site empty parameters under the dense names too, so that checkpoint keys match.

        Returns `{full name: "weight" or "bias"}`.
        """
        layer = model.get_submodule(site.name)
        shape = (site.in_features, site.out_features) if self.transposed else (site.out_features, site.in_features)
        # Not register_parameter: the names are properties of the layer.
        layer._parameters["weight"] = nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))
        if site.bias:
            layer._parameters["bias"] = nn.Parameter(torch.empty(site.out_features, device="meta", dtype=dtype))
        return {f"{site.name}.{leaf}": leaf for leaf in ("weight", "bias")[: 1 + site.bias]}

    def parts(self, site, factors):
        """`(member, its factors)` of each member of the site; `factors` has one entry a copy."""
        return [(site, factors)]

    def tensors(self, site, format, factors, dtype):
        """What the factorized site stores, bias excluded, by full name; `factors` has one entry a copy."""
        state = format.from_factors(factors[0], dtype=dtype).state_dict()
        return {f"{site.name}.{key}": value for key, value in state.items()}

    def bias_name(self, site, format):
        """Full name the bias has in the factorized layer; `None` where it keeps its name."""
        return f"{site.name}.{format.bias_name}"

    def spec(self, model, name):
        """What the checkpoint has to say about the factorized site `name`."""
        layer = model.get_submodule(name)
        spec = {**layer.spec(), "bias": True} if layer.added_bias else layer.spec()
        widths = {"out_features": layer.out_features, "in_features": layer.in_features}
        if tuple(widths.values()) != layer.replaced_shape:
            spec = {**spec, **widths}
        lender = getattr(layer, "lender", None)
        if lender is None:
            return spec
        basis = next((other for other, module in model.named_modules() if module is lender), None)
        if basis is None:
            raise CheckpointError(
                f"{name} borrows its basis from a layer that is not in this model any more, so that saving would lose "
                "it; call hf_lowrank.to_dense(model) first, or keep that layer."
            )
        return {**spec, "basis": basis}

    def relative_error(self, model, name):
        """The error recorded when the site was factorized, or `None`."""
        return model.get_submodule(name).relative_error

    def set_error(self, model, name, error):
        """Record the error of a factorized site."""
        model.get_submodule(name).relative_error = error

    def stored(self, model, name, bias=False):
        """What a factorized site keeps in a checkpoint, integers included, by full name.

        Without `bias`, only what stands for the dense weight: all but the bias, and that too where it was added.
        """
        layer = model.get_submodule(name)
        state = layer.state_dict(keep_vars=True)
        bias = bias or layer.added_bias
        return {f"{name}.{key}": tensor for key, tensor in state.items() if bias or key != layer.bias_name}

    def added_bias(self, model, name):
        """Whether a factorized site has a bias that its dense layer had not."""
        return model.get_submodule(name).added_bias

    def factors(self, model, name):
        """`(left, right)` of each copy in a factorized site, float64; see [`FormatLinear.factors`]."""
        return [model.get_submodule(name).factors()]

    def dense_shape(self, model, name):
        """`(copies, out, in)` of the weight that a factorized site had."""
        return 1, *model.get_submodule(name).replaced_shape

    def to_dense(self, model, name):
        """Put an ordinary layer of this kind back."""
        layer = model.get_submodule(name)
        weight, bias = layer.replacement()
        rows, columns = layer.replaced_shape
        dense = self.empty(columns, rows, bias is not None)
        trainable = any(p.requires_grad for p in self.stored(model, name).values())
        dense.weight = nn.Parameter(weight, requires_grad=trainable)
        if bias is not None:
            dense.bias = bias
        succeed(model, name, dense)

    def empty(self, in_features, out_features, bias):
        """A dense module of this kind without values."""
        return self.cls(in_features, out_features, bias=bias, device="meta")

    @contextmanager
    def watch(self, model, sites, observe):
        """While open, call `observe(site_name, inputs, outputs)` when one of the sites, all of one module, runs."""
        module = model.get_submodule(sites[0].name)
        # The hook must return None: anything else would replace the output.
        handle = module.register_forward_hook(
            lambda _, args, kwargs, output: observe(sites[0].name, *args, *kwargs.values(), output), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()


def _widths(spec, site):
    """`(out, in)` that a spec gives: those of the site, unless channels were pruned."""
    found = spec.get("out_features", site.out_features), spec.get("in_features", site.in_features)
    for name, width, most in zip(("out", "in"), found, (site.out_features, site.in_features), strict=True):
        if not is_integer(width, 1) or width > most:
            raise CheckpointError(
                f"`{name}_features`={width!r} of {site.name} must be an integer in 1..{most}, the width in the "
                f"architecture. {DAMAGED}"
            )
    return found


def succeed(model, name, layer):
    """Put `layer` in the place of the module `name`, whose mode and hooks it takes over."""
    before = model.get_submodule(name)
    for table in HOOKS:
        # The table itself: its handle removes a hook from there.
        setattr(layer, table, getattr(before, table))
    model.set_submodule(name, layer.train(before.training))


LINEAR_KINDS = [LinearKind(nn.Linear)]


def register_linear_kind(kind):
    """Make another sort of module factorizable; a second kind for the same class is ignored."""
    if all(type(known) is not type(kind) or known.cls is not kind.cls for known in LINEAR_KINDS):
        LINEAR_KINDS.append(kind)


def kind_of(module):
    """The kind of a dense `module`, or `None`."""
    return next((kind for kind in LINEAR_KINDS if kind.matches(module)), None)


def dense_kind(layer):
    """The kind a factorized single layer goes back to."""
    return next(kind for kind in LINEAR_KINDS if kind.single and kind.transposed == layer.transposed)
