import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...draws import TwoBranches
from ...errors import CheckpointError, ComputedWeightError, ConfigError, RankError, TargetError
from ...formats import FormatLinear, LowRankLinear, as_parameter
from ...integrations.peft_lora.merging import weight_before_merging
from ...linalg import require_finite
from ...methods import Factors
from ...rewrite import check_replaceable, check_rewritable, replace_factors
from ...sharding import refuse_sharded
from .._layer import linear_shape
from .._merge import check_mergeable, exchange_weight, first_weight, unmerge_from


class MixedRankLinear(nn.Module, BaseTunerLayer, TwoBranches):
    r"""A linear layer whose weight is the full-rank one or the product of two factors; see [`MixedRankConfig`].

    Both branches compute in the dtype of the base weight, whatever dtype the trained copies have, so that the
    full-rank branch starts with the bits of a dense base layer, and the factors end with those of the finished layer.

    Args:
        base_layer (`torch.nn.Module`): `torch.nn.Linear`, `Conv1D`, or a layer factorized into two factors; not
            quantized.

    Shapes:
        `mixed_rank_left[adapter]` `(out, r)`, `mixed_rank_right[adapter]` `(r, in)`; with `train_full`,
        `mixed_rank_full[adapter]` in the layout of a dense base weight, else `(out, in)`.
    """

    adapter_layer_names = ("mixed_rank_left", "mixed_rank_right", "mixed_rank_full")
    other_param_names = ("keep_zeros",)
    # Factors stand in for the weight: what another tuner would add to that is in none of them.
    only_tuner = "MIXED_RANK"

    def __init__(self, base_layer):
        super().__init__()
        self.out_features, self.in_features = linear_shape(base_layer)
        self.base_layer = base_layer
        self.mixed_rank_left = nn.ParameterDict()
        self.mixed_rank_right = nn.ParameterDict()
        self.mixed_rank_full = nn.ParameterDict()
        self.keep_zeros = {}
        # Adapters whose factors are still to be read from a file.
        self.unfilled = set()
        self.merged_adapters = []

    @staticmethod
    def check(module_name, base, config):
        """Refuse a layer without a weight or two factors that can be trained, and a rank that it cannot have.

        Raises:
            TargetError: `base` has no floating-point weight, is more than two factors, or DeepSpeed has split it.
            RankError: the rank exceeds min(out, in).
            CheckpointError: a saved adapter has no rank for this layer, or one that does not fit.
        """
        limit = min(linear_shape(base))
        if isinstance(base, FormatLinear):
            # Loading may make parameters without numbers, with which nothing can be tried out.
            check = check_replaceable if config.ranks is None else check_rewritable
            try:
                check(base)
            except ComputedWeightError as error:
                raise TargetError(
                    f"{error} Mixed-rank fine-tuning trains two factors: call hf_lowrank.to_dense(model) first, or "
                    "leave this layer out by `exclude_modules`."
                ) from error
            refuse_sharded(dict(base.named_parameters()))
        else:
            check_mergeable(base)
            refuse_sharded({"its weight": base.weight})
        if config.ranks is not None:
            rank = config.ranks.get(module_name)
            if not isinstance(rank, int) or not 1 <= rank <= limit:
                raise CheckpointError(
                    f"The adapter has rank {rank!r} for this layer, whose min(out, in) is {limit}; it was made for "
                    "another model. Load it onto the one it was made from."
                )
            return
        given = config.rank_pattern.get(config.key_for(module_name))
        if isinstance(base, FormatLinear):
            if isinstance(given, int):
                raise RankError(
                    f"`rank_pattern` gives rank {given} to a layer that is factorized already and keeps its own; call "
                    "hf_lowrank.truncate first to lower it, or leave it out of the pattern."
                )
            return
        rank = config.r if given is None else given
        if isinstance(rank, int) and rank > limit:
            raise RankError(f"rank {rank} exceeds min(out, in) = {limit}; lower it in `r` or `rank_pattern`.")

    def update_layer(self, adapter_name, config, rank, factors=None):
        """Add an adapter, or make it anew.

        Args:
            adapter_name (`str`): its name.
            config ([`MixedRankConfig`]): options.
            rank (`int`): of the factors.
            factors ([`Factors`], *optional*): where they start; without, they are NaN until a file is loaded.
        """
        weight = self.get_base_layer().weight
        if factors is None:
            left = weight.new_full((self.out_features, rank), torch.nan)
            factors = Factors(left, left.new_full((rank, self.in_features), torch.nan), None)
            self.unfilled.add(adapter_name)
        else:
            self.unfilled.discard(adapter_name)
        self.mixed_rank_left[adapter_name] = as_parameter(factors.left, weight.dtype)
        self.mixed_rank_right[adapter_name] = as_parameter(factors.right, weight.dtype)
        if config.train_full:
            self.mixed_rank_full[adapter_name] = nn.Parameter(self._base_weight().detach().clone())
        elif adapter_name in self.mixed_rank_full:
            del self.mixed_rank_full[adapter_name]
        self.keep_zeros[adapter_name] = config.keep_zeros
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter = None if self.disable_adapters or self.merged else self._active()
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        if not self.training:
            return self._low_rank(adapter, x)
        if self.drawn is None:
            raise ConfigError(
                "A mixed-rank layer runs in training mode, and no branch was drawn: add `MixedRankCallback()` to the "
                "`callbacks` of Trainer, call `hf_lowrank.draws.draw` before each step of a loop of your own, or put "
                "the model into evaluation mode."
            )
        return self._full(adapter, x) if self.drawn else self._low_rank(adapter, x)

    def _full(self, adapter, x):
        base = self.base_layer
        if adapter not in self.mixed_rank_full:
            y = base(x)
            # In a step that draws nothing trainable the loss would have no graph, and no backward pass.
            return y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()
        weight = self.mixed_rank_full[adapter].to(base.weight.dtype)
        if isinstance(base, FormatLinear):
            return F.linear(x, weight, base.bias)
        if self.keep_zeros[adapter]:
            weight = torch.where(base.weight == 0, base.weight, weight)
        return torch.func.functional_call(base, {"weight": weight}, (x,))

    def _low_rank(self, adapter, x):
        left, right = self._factors(adapter)
        return F.linear(F.linear(x, right), left, self.get_base_layer().bias)

    def _factors(self, adapter):
        if adapter in self.unfilled:
            if any(table[adapter].isnan().any() for table in (self.mixed_rank_left, self.mixed_rank_right)):
                raise CheckpointError(
                    f"The factors of the mixed-rank adapter {adapter!r} were not loaded. Its configuration is that of "
                    "a saved adapter: load that by PeftModel.from_pretrained or load_adapter; for a new one take a "
                    "MixedRankConfig with `ranks`=None."
                )
            self.unfilled.discard(adapter)
        dtype = self.get_base_layer().weight.dtype
        return self.mixed_rank_left[adapter].to(dtype), self.mixed_rank_right[adapter].to(dtype)

    def _active(self):
        """The one active adapter that this layer has, or `None`."""
        return only_one([name for name in self.active_adapters if name in self.mixed_rank_left])

    def _base_weight(self):
        """The weight of the base layer as it was before any merge; `(out, in)` of a factorized one."""
        base = self.get_base_layer()
        return weight_before_merging(base) if isinstance(base, FormatLinear) else first_weight(base)

    @torch.no_grad()
    def merge(self, safe_merge=False, adapter_names=None):
        """Put the product of the factors of one adapter in place of the base weight, which is kept.

        Args:
            safe_merge (`bool`, defaults to `False`): PEFT's argument; a product that is not finite is always refused.
            adapter_names (`list[str]`, *optional*): one name; the active adapter by default.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mixed_rank_left]
        if not names:
            return
        only_one([*self.merged_adapters, *names])
        base = self.get_base_layer()
        product = self._product(names[0]).to(base.weight.dtype)
        require_finite(product, "The product of the factors")
        exchange_weight(base, product)
        self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self):
        """Restore the weight of the base layer, bit for bit."""
        unmerge_from(self.get_base_layer())
        self.merged_adapters.clear()

    @torch.no_grad()
    def unload_and_optionally_merge_module(self, merge, safe_merge=False, adapter_names=None):
        """The base layer, or the factorized layer that one adapter has become, in the format it had if it was one."""
        base = self.get_base_layer()
        names = check_adapters_to_merge(self, adapter_names) if not self.merged else self.merged_adapters
        adapter = only_one([name for name in names if name in self.mixed_rank_left]) if merge else None
        if adapter is None:
            return base
        left, right = self._factors(adapter)
        for factor in (left, right):
            require_finite(factor, "A factor")
        if isinstance(base, FormatLinear):
            if self.merged:
                self.unmerge()
            replace_factors(base, left.double(), right.double(), peers=self.lenders)
            return base
        layer = LowRankLinear.from_factors(
            Factors(left, right, None), base.bias, left.dtype, transposed=isinstance(base, Conv1D)
        )
        # Of the trained factors, the error that they started with says nothing.
        return layer.requires_grad_(base.weight.requires_grad).train(self.training)

    def get_delta_weight(self, adapter):
        """What the factors of one adapter differ from the base weight by, in its layout, in float32 or wider."""
        product = self._product(adapter)
        return product - self._base_weight().to(product)

    def supports_lora_conversion(self, adapter_name="default"):
        return True

    def _product(self, adapter):
        """The product of the factors in the layout of the base weight, in float32 or wider."""
        left, right = self._factors(adapter)
        wide = torch.promote_types(left.dtype, torch.float32)
        product = left.to(wide) @ right.to(wide)
        return product.T if isinstance(self.get_base_layer(), Conv1D) else product


def only_one(names):
    """The only name in `names`, `None` of none.

    Raises:
        ConfigError: there are more.
    """
    if len(names) > 1:
        raise ConfigError(
            f"The mixed-rank adapters {list(names)} would each put factors in the place of one weight; activate or "
            "merge one of them."
        )
    return names[0] if names else None
