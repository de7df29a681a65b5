from dataclasses import dataclass

from peft.utils.other import get_pattern_key

from ...checks import check_boolean
from ...errors import ConfigError
from ...formats import LowRankLinear
from ...methods import METHODS
from ...recipe import Recipe
from .._config import TargetConfig, check_rank_option


@dataclass
class MixedRankConfig(TargetConfig):
    r"""Fine-tuning of factors together with the full-rank weight they came from.

        y = z x W^T + (1 - z) x (left right)^T + b,    z ~ Bernoulli(p) for each layer and step, p -> 0

    The factors are made from the dense weight when the adapter is added. [`MixedRankCallback`] draws z and takes p to
    zero; [`MixedRankTrainer`] also compares two draws of a step. Only what was drawn gets a gradient, so that the
    other branch stands still for a step, its momentum and weight decay included. In evaluation mode z = 0: what is
    measured is the model that comes out. `merge_and_unload` leaves that model, factorized, with the same bits.

    A layer that is factorized already, into two factors and nothing else, starts from these at the rank they have,
    and its full-rank weight from their product; no budget counts it. It ends in the format it had, which in
    `"low_rank"` keeps the bits and in others rounds once.

    With `train_full` the adapter has a copy of every targeted weight, which is trained and saved with it; the base
    model is never changed.

    Args:
        r (`int`, *optional*): rank of every layer, 1 or more; at break-even and above a layer stays dense.
        param_ratio (`float`, *optional*): parameters kept / parameters of the targeted linears, in (0, 1]; 0.5 where
            no `r` is given.
        method (`str`, `dict` or [`Method`], defaults to `"svd"`): how the factors are made; any that factorizes one
            weight at a time and leaves biases alone.
        statistics (`str`, *optional*): file of saved statistics (`collect_statistics(...).save`), local or on the
            Hub, for methods that need them; read when the adapter is made, not when it is loaded.
        rank_pattern (`dict[str, int | "dense"]`, *optional*): module name, dotted suffix or regular expression -> its
            own rank; `"dense"` leaves a layer as it is, and is all that a factorized one can be given.
        allocation (`str`, `dict` or [`Allocator`], *optional*): who gets how much of `param_ratio`; by default what
            suits the method.
        rank_multiple (`int`, defaults to 8): allocated ranks are multiples of it, at least 1; where a weight or the
            budget has no room for these, of its half, and so on.
        train_full (`bool`, defaults to `True`): whether the full-rank weight is trained where it is drawn; otherwise
            it stays the base model's, and takes no memory.
        keep_zeros (`bool`, defaults to `True`): whether zeros of the base weight stay zero in the trained copy, so
            that a pruned weight stays as sparse; of dense layers.
        ranks (`dict[str, int]`, *optional*): written into saved adapters; not to be given.

    `target_modules` (by default every linear but the output head), `exclude_modules`, `bias` (`"none"`, `"all"`,
    `"mixed_rank_only"`), `modules_to_save`, `layers_to_transform` and `layers_pattern` are those of
    `peft.LoraConfig`.

    Raises:
        ConfigError: a value that is not allowed, or a method that cannot be used here.

    Reference:
        LPAF, LREC-COLING 2024, https://arxiv.org/abs/2306.14152, its third stage. Reconstructed from memory: there is
        no public code, and p = 0.5, a linear schedule over the first half of the steps, one draw for each layer and
        step, a trained full-rank weight, and factors in evaluation are our choice.
    """

    r: int | None = None
    param_ratio: float | None = None
    method: object = "svd"
    statistics: str | None = None
    allocation: object = None
    rank_multiple: int = 8
    train_full: bool = True
    keep_zeros: bool = True
    ranks: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_full", "keep_zeros"):
            check_boolean(name, getattr(self, name))
        if self.r is not None:
            check_rank_option("`r`", self.r)
            if self.param_ratio is not None:
                raise ConfigError(f"Give one budget, not `r`={self.r} and `param_ratio`={self.param_ratio!r}.")
        elif self.param_ratio is None:
            self.param_ratio = 0.5
        recipe = self.recipe()
        self._check_method(recipe)
        self.method = METHODS.describe(recipe.method)
        if self.allocation is not None:
            self.allocation = recipe.to_json()["allocation"]
        if self.ranks is not None and not isinstance(self.ranks, dict):
            raise ConfigError(f"`ranks`={self.ranks!r} must be a dict from module names, as an adapter's file has it.")

    def key_for(self, module_name):
        """The key of `rank_pattern` that a module has its rank from, or its own name."""
        return get_pattern_key(list(self.rank_pattern), module_name)

    def recipe(self, **targets):
        """The [`Recipe`] of the factors; `targets` are its `target_modules` and `rank_pattern`."""
        return Recipe(
            method=self.method,
            rank=self.r,
            param_ratio=self.param_ratio,
            allocation=self.allocation,
            rank_multiple=self.rank_multiple,
            format=LowRankLinear.name,
            calibration=self.statistics,
            **{"rank_pattern": self.rank_pattern, **targets},
        )

    def _check_method(self, recipe):
        method = recipe.method
        if method.joint_groups or method.share_layers > 1 or method.anchored or method.shifts:
            raise ConfigError(
                f"`method`={method.name!r} with these options shares factors, changes biases or looks at the "
                "compressed model, and mixed-rank layers are made one by one; use 'svd', 'kfac_svd', 'whitened_svd' "
                "or another method without that."
            )
        if recipe.needs_probe:
            raise ConfigError(
                f"`allocation`={recipe.allocation.name!r} compares outputs of the model on calibration data, which "
                "an adapter does not have; use one that does without, such as 'knapsack', or set `rank_pattern`."
            )
        given = self.statistics is not None
        if given and (not isinstance(self.statistics, str) or not self.statistics.endswith(".safetensors")):
            raise ConfigError(f"`statistics`={self.statistics!r} must name a .safetensors file of saved statistics.")
        if recipe.needs_statistics and not given:
            raise ConfigError(
                f"`method`={method.name!r} needs statistics: save them by "
                f"`collect_statistics(model, method={method.name!r}).save('statistics.safetensors')` and give that "
                "file as `statistics`, or use method='svd'."
            )
        if given and not recipe.needs_statistics:
            raise ConfigError(
                f"`statistics`={self.statistics!r} would not be read: `method`={method.name!r} needs none. Leave it "
                "out, or choose a method that reads it."
            )
