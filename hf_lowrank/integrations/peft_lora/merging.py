"""Merge adapters into factorized layers: exactly, as factors, and undone to the bit."""

import functools
from contextlib import contextmanager

import torch
from torch import nn

from ...errors import LowRankError
from ...formats import FormatLinear
from ...rewrite import absorb, check_rewritable, restore, snapshot


# The attribute of a layer that holds its Merged, if any.
MERGED = "_merged"


class Merged:
    """What is merged into layers that had no factor in common with others, and what they were before."""

    def __init__(self, layers):
        self.layers = layers
        self.before = snapshot(layers)
        # (PEFT layer, name of its adapter), in the order of merging.
        self.history = []

    @classmethod
    def begin(cls, layer, lenders):
        """Remember `layer` and those of `lenders` that have a basis in common with it."""
        owner = getattr(layer, "lender", None) or layer
        group = [layer, *(other for other in lenders if other is not layer and (other.lender or other) is owner)]
        merged = cls(group)
        for member in group:
            vars(member)[MERGED] = merged

    def undo(self):
        """Bring back the layers, and forget."""
        restore(self.before)
        for member in self.layers:
            vars(member).pop(MERGED, None)


def weight_before_merging(layer):
    """The weight `(out, in)` of a factorized layer as it was before any merge."""
    merged = vars(layer).get(MERGED)
    if merged is None:
        return layer.dense_weight().detach()
    now = snapshot(merged.layers)
    restore(merged.before)
    try:
        return layer.dense_weight().detach()
    finally:
        restore(now)


class MergesFactors:
    """Mixed into a PEFT layer whose base layer is factorized.

    PEFT's own `merge` runs on an ordinary linear layer of the same weight in float32 or wider, so that it means what
    it means anywhere else; the result is put back as factors. LoRA and DoRA of rank k raise the rank by k, exactly.
    What adds a matrix of full rank (WaveFT, FourierFT, HiRA) raises it up to `min(out, in)`. `unmerge` brings back
    the tensors from before, which are kept until then.
    """

    def merge(self, safe_merge=False, adapter_names=None):
        layer = self.get_base_layer()
        if not isinstance(layer, FormatLinear):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str) or set(names) <= set(self.merged_adapters):
            # PEFT refuses, or warns of what was merged before.
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        check_rewritable(layer)
        for name in names:
            if name not in self.merged_adapters:
                self._merge_one(layer, name, safe_merge)

    def _merge_one(self, layer, name, safe_merge):
        stand_in = _dense(layer)
        if not self._merge_as_dense(layer, stand_in, name, safe_merge):
            return
        if MERGED not in vars(layer):
            Merged.begin(layer, self.lenders)
        bias = None if layer.bias is None else stand_in.bias.to(layer.bias.dtype)
        try:
            absorb(layer, stand_in.weight, bias, self._updates(name), self.lenders)
        except LowRankError:
            self.merged_adapters.remove(name)
            raise
        vars(layer)[MERGED].history.append((self, name))

    def _merge_as_dense(self, layer, stand_in, name, safe_merge):
        """PEFT's own merge, into a dense layer that stands in for the factorized one; whether it changed that."""
        outer = self
        while outer.base_layer is not layer:
            outer = outer.base_layer
        outer.base_layer = stand_in
        try:
            with _widened(self, stand_in.weight.dtype):
                super().merge(safe_merge=safe_merge, adapter_names=[name])
            exchanges = outer.base_layer is not stand_in
            if exchanges:
                super().unmerge()
        finally:
            outer.base_layer = layer
        if exchanges:
            # Methods that hold a copy of the layer (LN tuning) put it in the layer's place, and need no other help.
            super().merge(safe_merge=safe_merge, adapter_names=[name])
        return name in self.merged_adapters and not exchanges

    def _updates(self, name):
        """The factors of what `name` adds, where there are any; [`absorb`] checks them against the merged weight.

        Of LoRA, and of any PEFT layer with a method `get_delta_factors(name)` that returns `(B, A)`, scale included.
        """
        if hasattr(self, "get_delta_factors"):
            return [self.get_delta_factors(name)]
        tables = getattr(self, "lora_A", {}), getattr(self, "lora_B", {})
        if not all(name in table and isinstance(table[name], nn.Linear) for table in tables):
            return ()
        down, up = (table[name].weight for table in tables)
        return [(up * self.scaling[name], down)]

    def unmerge(self):
        layer = self.get_base_layer()
        if MERGED not in vars(layer):
            return super().unmerge()
        merged = vars(layer)[MERGED]
        merged.undo()
        self.merged_adapters.clear()
        # Other adapters around the same layer (PeftMixedModel), or at one that shared its basis, stay merged.
        for other, name in merged.history:
            if other is not self:
                other.merged_adapters.remove(name)
                other._merge_one(other.get_base_layer(), name, safe_merge=False)

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _mergeable(cls):
    # PEFT tells linear adapters by the word in the name of their class.
    return type(f"Factorized{cls.__name__}", (MergesFactors, cls), {"__module__": cls.__module__})


def _rebuild(cls):
    module = cls.__new__(cls)
    module.__class__ = _mergeable(cls)
    return module


def make_mergeable(module, lenders):
    """Let the PEFT layer `module` merge into factors; `lenders` are the layers of its model that may share a basis."""
    if not isinstance(module, MergesFactors):
        module.__class__ = _mergeable(type(module))
    # In a tuple, where their parameters are not found a second time.
    module.lenders = lenders


def _dense(layer):
    """An ordinary linear layer of the same weight and bias, in float32 or wider."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.exact_weight().to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True), requires_grad=False)
    return linear


@contextmanager
def _widened(module, dtype):
    """While open, floating parameters of the PEFT layer that are narrower than `dtype` are of `dtype`."""
    own = (parameter for name, parameter in module.named_parameters() if "base_layer" not in name.split("."))
    narrow = [(p, p.data) for p in own if p.is_floating_point() and p.itemsize < dtype.itemsize]
    for parameter, data in narrow:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in narrow:
            parameter.data = data
