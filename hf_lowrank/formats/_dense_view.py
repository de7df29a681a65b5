"""The weight of a factorized layer for whoever asks for one: read-only, and computed only if it is needed."""

import torch

from ..errors import ComputedWeightError


# What a DenseView answers without forming the product: attributes (shape, dtype, device) and sizes.
CHEAP = {"__get__", "size", "dim", "numel", "element_size", "is_floating_point", "stride", "__len__"}
WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__delete__"}
LOST = (
    "would write into the computed weight of a factorized layer and be lost; change the factors, or call "
    "hf_lowrank.to_dense(model) first."
)


class DenseView(torch.Tensor):
    """A read-only stand-in for the dense weight of a factorized layer.

    Shape, dtype and device cost nothing to ask for (models do, on every forward); the product of the factors is
    formed only when an operation needs the values. Writing into it, or into its `data`, would be lost, so it raises.

    Args:
        layer ([`FactorizedLayer`]): whose weight it stands for.
        transposed (`bool`, *optional*): `(in, out)` rather than `(out, in)`; that of the layer by default.
        detached (`bool`, defaults to `False`): whether gradients stop here.
    """

    # transformers leaves tensors with this mark alone when it initialises what a checkpoint does not hold.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer, transposed=None, detached=False):
        reference = next(layer.parameters())
        dtype = reference.dtype if reference.is_floating_point() else torch.float32
        shape = layer.dense_shape
        transposed = layer.transposed if transposed is None else transposed
        return torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=dtype, device=reference.device
        )

    def __init__(self, layer, transposed=None, detached=False):
        self.layer = layer
        self.transposed = layer.transposed if transposed is None else transposed
        self.detached = detached

    def materialize(self):
        """The dense weight as an ordinary tensor, in the layout that was asked for."""
        dense = self.layer.dense_weight()
        dense = dense.detach() if self.detached else dense
        return dense.T if self.transposed else dense

    def __setattr__(self, name, value):
        if name == "data":
            raise ComputedWeightError(f"Assigning `weight.data` {LOST}")
        if name == "requires_grad":
            # Freezing a weight means freezing what it is computed from.
            for parameter in self.layer.parameters():
                if parameter is not self.layer.bias:
                    parameter.requires_grad = value
            return
        super().__setattr__(name, value)

    def __repr__(self):
        return f"DenseView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # Above autograd: gradients reach the factors through whatever is computed from the weight.
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.data.__get__:
            # A plain tensor here could be written into without anybody noticing.
            return cls(args[0].layer, args[0].transposed, detached=True)
        if name in CHEAP:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in WRITES or (name.endswith("_") and not name.endswith("__")):
            raise ComputedWeightError(f"{name} {LOST}")
        values = torch.utils._pytree.tree_map_only(cls, cls.materialize, (args, kwargs or {}))
        return func(*values[0], **values[1])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            raise ComputedWeightError(f"{func} {LOST}")
        values = torch.utils._pytree.tree_map_only(cls, cls.materialize, (args, kwargs or {}))
        return func(*values[0], **values[1])
