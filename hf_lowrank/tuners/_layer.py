import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..formats import FormatLinear
from ._merge import merge_into, unmerge_from


class FactorTunerLinear(nn.Module, BaseTunerLayer):
    r"""A linear layer with adapters, each of which adds the product of two factors to its weight.

        y = base(x) + sum_a left_a (right_a dropout(x))

    A tuner is a subclass that says in `factors` how the two come out of its parameters. Forward, merge, the update as
    a matrix, and the exact conversion to LoRA follow from them here, alike for all tuners.

    Args:
        base_layer (`torch.nn.Module`): `torch.nn.Linear`, `Conv1D`, or a factorized layer.

    Raises:
        TargetError: `base_layer` is something else.
    """

    other_param_names = ("scaling", "dropout")

    def __init__(self, base_layer):
        super().__init__()
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        self.out_features, self.in_features = linear_shape(base)
        self.base_layer = base_layer
        self.scaling = {}
        self.dropout = {}
        self.merged_adapters = []

    def factors(self, adapter):
        """`left` `(out, R)`, scale included, and `right` `(R, in)` of one adapter, through which gradients flow."""
        raise NotImplementedError

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            left, right = self.factors(adapter)
            inputs = F.dropout(self._cast_input_dtype(x, right.dtype), self.dropout[adapter], self.training)
            result = result + F.linear(F.linear(inputs, right), left)
        return result.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge=False, adapter_names=None):
        """Add the updates of adapters to the weight of the base layer.

        Args:
            safe_merge (`bool`, defaults to `False`): PEFT's argument; a merge that is not finite is always refused.
            adapter_names (`list[str]`, *optional*): the active ones by default.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if names:
            lefts, rights = zip(*map(self.factors, names), strict=True)
            merge_into(self.get_base_layer(), torch.cat(lefts, 1), torch.cat(rights))
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self):
        """Restore the weight of the base layer, bit for bit."""
        unmerge_from(self.get_base_layer())
        self.merged_adapters.clear()

    def get_delta_factors(self, adapter):
        """`factors` under the name by which merging into a factorized layer asks for them."""
        return self.factors(adapter)

    def get_delta_weight(self, adapter):
        """The update of one adapter in the layout of the base weight, in float32 or wider."""
        left, right = self.factors(adapter)
        wide = torch.promote_types(left.dtype, torch.float32)
        update = left.to(wide) @ right.to(wide)
        return update.T if isinstance(self.get_base_layer(), Conv1D) else update

    def supports_lora_conversion(self, adapter_name="default"):
        return True


def linear_shape(base):
    """`(out, in)` of a layer that adapters can wrap.

    Raises:
        TargetError: it is none.
    """
    if isinstance(base, (nn.Linear, FormatLinear)):
        return base.out_features, base.in_features
    if isinstance(base, Conv1D):
        return tuple(reversed(base.weight.shape))
    raise TargetError(
        f"`target_modules` names a {type(base).__name__}; adapters go onto torch.nn.Linear, Conv1D and factorized "
        "layers. Leave it out by `exclude_modules`, or name linear layers."
    )
