"""`LowRankConfig`: a [`Recipe`] that transformers carries through `from_pretrained` and writes into config.json."""

import copy
import os
import warnings
from dataclasses import dataclass, field, fields

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ConfigError
from ..formats import FORMATS
from ..readme import repository
from ..recipe import Recipe
from ..versions import versions
from .calibration import SELF, Calibration
from .inner import as_inner, group_size, method_of


QUANT_METHOD = "lowrank"
VERSION = 1
# What the `recipe` of a checkpoint says beside arguments of `LowRankConfig`.
RECORDED = ("base_model", "channel_pruning", "versions")


@register_quantization_config(QUANT_METHOD)
@dataclass
class LowRankConfig(Recipe, QuantizationConfigMixin):
    """A [`Recipe`] for `from_pretrained`.

    In a checkpoint it reads `{"quant_method": "lowrank", "version": 1, "recipe": ..., "modules": ...}`. Loading looks
    at `modules` only: formats and shapes, never methods. `recipe` says how they came about. Where the factors are
    quantized, `inner` is the configuration of that, as transformers writes it.
    """

    # {module: {"format": name, ...}} of what is factorized; None until a plan is made.
    modules: dict | None = field(default=None, repr=False)
    # The recipe as it stands in a checkpoint; None for one that is yet to be carried out.
    recipe: dict | None = field(default=None, repr=False)
    # The quantization config of the factors and of what stays dense; None for ordinary numbers.
    inner: object = field(default=None, repr=False)
    # What one `from_pretrained` call knows beside its config; never copied into JSON.
    session: object = field(default=None, repr=False)

    quant_method: str = field(default=QUANT_METHOD, init=False, repr=False)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """From the JSON of a checkpoint, or from a dict of constructor arguments (which has no `modules`)."""
        options = {key: value for key, value in config_dict.items() if key not in ("quant_method", "version")}
        inner = options.pop("inner", None)
        inner = None if inner is None else as_inner(inner)
        _check_modules(options.get("modules"))
        if not options.get("modules"):
            # What `to_dict` makes of a configuration that is yet to be carried out has none.
            options.pop("modules", None)
            config = cls._from_options(options, inner)
        else:
            version = config_dict.get("version")
            if version != VERSION:
                raise CheckpointError(
                    f"This checkpoint has lowrank config version {version!r}, this hf_lowrank reads version "
                    f"{VERSION}; upgrade it with `pip install -U hf-lowrank`."
                )
            config = cls(modules=options["modules"], recipe=options.get("recipe") or {}, inner=inner, calibration=None)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_options(cls, options, inner):
        """From constructor arguments, and a `recipe` with more of them, of which the former win."""
        recipe = options.pop("recipe", None)
        recipe = {} if recipe is None else recipe
        if not isinstance(recipe, dict):
            raise ConfigError(f"`recipe`={recipe!r} must be a dict of options of LowRankConfig.")
        recipe = {key: value for key, value in recipe.items() if key not in RECORDED}
        record = None
        if "calibration" in options:
            options["calibration"] = _data(options["calibration"])
        elif isinstance(recipe.get("calibration"), dict):
            record, recipe["calibration"] = recipe["calibration"], _recorded(recipe["calibration"])
        options = {**recipe, **options}
        refuse_unknown("LowRankConfig", options, [f.name for f in fields(Recipe)])
        config = cls(**options, inner=inner)
        if record is not None and config.calibration == SELF and (config.needs_statistics or config.samples_kept):
            warnings.warn(
                f"The recipe records that its calibration data was {record.get('data')!r}, and not the data; unless "
                "`calibration` is given, text sampled from the model itself ('self') takes its place.",
                stacklevel=4,
            )
        return config

    def __deepcopy__(self, memo):
        # transformers copies configs at will; calibration data may be large, or a generator, which cannot be copied.
        memo[id(self.calibration)] = self.calibration
        twin = copy.copy(self)
        for f in fields(self):
            setattr(twin, f.name, copy.deepcopy(getattr(self, f.name), memo))
        return twin

    def again(self, calibration=None):
        """A copy to carry out on a model; a configuration out of a checkpoint becomes the recipe it records.

        Of calibration data only samples of the model can be had again; "self" takes the place of other data, with a
        warning. With a `calibration`, nothing has to: the copy has none of its own.

        Raises:
            ConfigError: of a checkpoint that records nothing.
        """
        if self.recipe is None:
            return copy.copy(self)
        if not self.recipe:
            raise ConfigError(
                "The configuration is of a checkpoint that does not record how it was made; give a LowRankConfig "
                "of your own."
            )
        own = {} if calibration is None else {"calibration": None}
        again = LowRankConfig.from_dict({"recipe": self.recipe, **own})
        again.inner = self.inner
        return again

    @property
    def rank_step(self):
        # A rank is the length of the rows of a left factor, which an inner quantizer may divide into groups.
        return group_size(self.inner)

    def record(self, model, calibration):
        """Keep as `recipe` what is being carried out: the arguments, on which model and data, by which versions.

        Args:
            model (`torch.nn.Module`): dense, or what is left of it.
            calibration (`dict`, *optional*): JSON that describes the data.
        """
        self.recipe = {**self.to_json(), "calibration": calibration, "versions": versions()}
        base = repository(getattr(model, "name_or_path", None))
        if base is not None:
            self.recipe["base_model"] = base

    def to_dict(self):
        described = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "recipe": self.to_json() if self.recipe is None else self.recipe,
            "modules": self.modules or {},
        }
        if self.recipe is None:
            described["calibration"] = _described(self.calibration)
        if self.inner is not None:
            described["inner"] = {**self.inner.to_dict(), "quant_method": method_of(self.inner)}
        return described

    def __iter__(self):
        yield from self.to_dict().items()

    def get(self, key, default=None):
        """Dict-like access, since transformers treats a loaded model's `quantization_config` as a dict."""
        return getattr(self, key, default)


# The arguments are documented once, where they are checked.
LowRankConfig.__doc__ += Recipe.__doc__.partition("\n")[2]


def _data(value):
    """The calibration data that a dict of options asks for, in which a dict of plain values is a [`Calibration`]."""
    if not isinstance(value, dict) or any(isinstance(item, torch.Tensor) for item in value.values()):
        return value
    refuse_unknown("Calibration", value, [f.name for f in fields(Calibration)])
    return Calibration(**value)


def _described(calibration):
    """The JSON that [`_data`] reads; `None` for data that only this process has."""
    if not isinstance(calibration, Calibration):
        return os.fspath(calibration) if isinstance(calibration, (str, os.PathLike)) else None
    names = [f.name for f in fields(Calibration) if f.name == "data" or getattr(calibration, f.name) != f.default]
    given = {name: getattr(calibration, name) for name in names}
    for name in {"data", "folder"} & given.keys():
        if not isinstance(given[name], (str, os.PathLike)):
            return None
        given[name] = os.fspath(given[name])
    return given


def _recorded(record):
    """The data that a checkpoint records: samples of the model, which can be drawn again; else "self" in its place."""
    if record.get("data") != SELF or "sampled" in record:
        return SELF
    return Calibration(**{name: record[name] for name in ("samples", "length", "temperature") if name in record})


def refuse_unknown(owner, options, known):
    """Refuse keys of `options` that are not among the `known` ones; `owner` is whose they are, for the message."""
    unknown = sorted(set(map(str, options)) - set(known))
    if unknown:
        raise ConfigError(f"{owner} has no option {unknown}; its options are {known}.")


def _check_modules(modules):
    if modules is None:
        return
    if not isinstance(modules, dict):
        raise CheckpointError(f"`modules` of the checkpoint's lowrank config is {type(modules).__name__}, not a dict.")
    for name, spec in modules.items():
        format = spec.get("format") if isinstance(spec, dict) else None
        if not isinstance(format, str) or format not in FORMATS:
            raise CheckpointError(
                f"The checkpoint stores {name} as {spec!r}; this hf_lowrank knows the formats {FORMATS.names()}. "
                "A newer version may know it: `pip install -U hf-lowrank`."
            )
        if "basis" in spec and not (FORMATS[format].lent and isinstance(spec["basis"], str)):
            lending = [other for other in FORMATS.names() if FORMATS[other].lent]
            raise CheckpointError(
                f"The checkpoint stores {name} as {spec!r}; `basis` is the name of a module, and only the formats "
                f"{lending} have one. Download or save it again."
            )
