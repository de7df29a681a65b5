import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ..checks import check_boolean, is_integer, is_number
from ..errors import ConfigError
from ._register import extend_peft_type, saved_type


@dataclass
class TargetConfig(PeftConfig):
    """Which layers a tuner adapts and what is trained beside, by the names that `peft.LoraConfig` gives these.

    `name` is set by [`register_tuner`].

    Args:
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): every linear but the output head; or a
            regular expression for full names; or a list of names or dotted suffixes. A factorized layer counts as one.
        exclude_modules (`str` or `list[str]`, *optional*): what to leave out of these.
        rank_pattern (`dict[str, ...]`, *optional*): module name, dotted suffix or regular expression -> its own rank.
        bias (`str`, defaults to `"none"`): biases that are trained and saved too: `"none"`, `"all"`, or those of the
            adapted layers.
        modules_to_save (`list[str]`, *optional*): modules that are trained whole, and saved with the adapter.
        layers_to_transform (`int` or `list[int]`, *optional*): only layers of these indices.
        layers_pattern (`str` or `list[str]`, *optional*): name of the list of layers, for `layers_to_transform`.

    Raises:
        ConfigError: a value that is not allowed.
    """

    name: ClassVar[str]
    target_modules: list | str | None = "all-linear"
    exclude_modules: list | str | None = None
    rank_pattern: dict = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list | None = None
    layers_to_transform: list | int | None = None
    layers_pattern: list | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = extend_peft_type(type(self).name)
        self.target_modules = self._checked_names("target_modules")
        self.exclude_modules = self._checked_names("exclude_modules")
        biases = ("none", "all", f"{type(self).name}_only")
        if self.bias not in biases:
            raise ConfigError(f"`bias`={self.bias!r} must be one of {biases}.")
        self._check_pattern("rank_pattern")
        self._check_layers()
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` goes with a list of `target_modules`, not with the regular expression "
                        f"{self.target_modules!r}; write the layers into the expression."
                    )

    def to_dict(self):
        """The configuration as it is saved; its `peft_type` tells a stack without this package what to install."""
        described = {**super().to_dict(), "peft_type": saved_type(self.peft_type)}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}

    def _checked_names(self, name):
        value = getattr(self, name)
        if value is None and name == "exclude_modules":
            return value
        if isinstance(value, str) and value:
            _check_expression(f"`{name}`={value!r}", value)
            return value
        if not isinstance(value, (list, tuple, set)) or not value or not all(isinstance(e, str) for e in value):
            raise ConfigError(
                f"`{name}`={value!r} must be a regular expression, or a non-empty list of names or suffixes."
            )
        return set(value)

    def _check_layers(self):
        # PEFT would go through the letters of a string.
        if self.modules_to_save is not None and not _are_names(self.modules_to_save):
            raise ConfigError(f"`modules_to_save`={self.modules_to_save!r} must be a list of names of modules.")
        indices = self.layers_to_transform
        listed = indices if isinstance(indices, (list, tuple)) else [] if indices is None else [indices]
        if not all(is_integer(index, 0) for index in listed):
            raise ConfigError(
                f"`layers_to_transform`={indices!r} must be the index of a layer, from 0, or a list of such indices."
            )
        pattern = self.layers_pattern
        if pattern is not None and not isinstance(pattern, str) and not _are_names(pattern):
            raise ConfigError(
                f"`layers_pattern`={pattern!r} must be the name of a list of layers, or a list of names."
            )

    def _check_pattern(self, name):
        value = getattr(self, name)
        if not isinstance(value, dict):
            raise ConfigError(f"`{name}`={value!r} must be a dict from module names.")
        for pattern in value:
            _check_expression(f"`{name}` key {pattern!r}", pattern)


@dataclass
class TunerConfig(TargetConfig):
    """A [`TargetConfig`] of tuners that add a low-rank update to a weight, with LoRA's options for these.

    Args:
        r (`int`): rank.
        lora_alpha (`float`): the update is scaled by `lora_alpha / r`.
        lora_dropout (`float`, defaults to 0.0): probability in [0, 1) of dropping an input of the adapter.
        use_rslora (`bool`, defaults to `False`): scale by `lora_alpha / sqrt(r)` instead.
        alpha_pattern (`dict[str, float]`, *optional*): what `rank_pattern` is for `r`, for `lora_alpha`.

    Raises:
        ConfigError: a value that is not allowed.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    alpha_pattern: dict = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_rank_option("`r`", self.r)
        _check_alpha("`lora_alpha`", self.lora_alpha)
        check_boolean("use_rslora", self.use_rslora)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"`lora_dropout`={self.lora_dropout!r} must be in [0, 1): a probability of dropping.")
        self._check_pattern("alpha_pattern")
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"`alpha_pattern`[{pattern!r}]", alpha)

    def rank_for(self, module_name):
        """The entry of `rank_pattern` for a module, or `r`."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), self.r)

    def scale_for(self, module_name, rank):
        """The scale of the update of a module whose rank is `rank`."""
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module_name), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _are_names(value):
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


def check_rank_option(name, value, least=1):
    """Refuse anything but an integer of at least `least`."""
    if not is_integer(value, least):
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}.")


def _check_alpha(name, value):
    if not is_number(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} must be a number above 0.")


def _check_expression(name, value):
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{name} is not a regular expression: {error}.") from error
