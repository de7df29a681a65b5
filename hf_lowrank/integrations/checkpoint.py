"""What a checkpoint holds: keys and shapes from file headers, before a weight is read; integers after."""

import copy
import functools
from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import load_state_dict

from ..errors import CheckpointError
from ..formats import FormatLinear
from ..surgery import factorized


def stored_keys(files):
    """`{key: shape}` of everything in the checkpoint files.

    Raises:
        CheckpointError: a file that cannot be read, with its name.
    """
    found = {}
    for path in files:
        try:
            if path.endswith(".safetensors"):
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a dict)
                        found[key] = tuple(file.get_slice(key).get_shape())
            else:
                found.update({key: tuple(t.shape) for key, t in load_state_dict(path, map_location="meta").items()})
        except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}. Download or copy the file again.") from error
    return found


class Conversions:
    """Which parameters transformers makes of which keys of a checkpoint, by its own renaming and merging.

    A conversion is known by the first parameter that it makes; most make one parameter of one key.

    Args:
        model (`PreTrainedModel`): the skeleton; its state says what a parameter is.
        keys (`Iterable[str]`): of the checkpoint.
        key_mapping (`dict`, *optional*): as given to `from_pretrained`.
        quantizer (`HfQuantizer`, *optional*): whose own conversions count too.

    Attributes:
        keys (`dict[str, list[tuple]]`): `(key, pattern)` of what is read, by conversion; the pattern is `None` where a
            key is only renamed.
        unexpected (`dict[str, list[tuple]]`): the same of what would be made and is no parameter.
        used (`list[WeightTransform]`): the rules that matched, which saving goes back by.
    """

    def __init__(self, model, keys, key_mapping=None, quantizer=None):
        rules = get_model_conversion_mapping(model, key_mapping, quantizer)
        renamings = [entry for entry in rules if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in rules if isinstance(entry, WeightConverter)]
        self._rules = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.keys, self.unexpected = {}, {}
        prefix, state = model.base_model_prefix, model.state_dict()
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            (self.keys if name in state else self.unexpected).setdefault(name, []).append((key, pattern))
        self.used = [rule for rule in rules if rule.was_used()]
        self._dtypes = {name: state[name].dtype for name in self.keys}

    def names(self, conversion):
        """The parameters that a conversion makes."""
        pattern = (self.keys.get(conversion) or self.unexpected[conversion])[0][1]
        if pattern is None:
            return [conversion]
        # A one-to-many conversion is known by its first target; the others share its prefix.
        first, *others = self._rules[pattern].target_patterns
        return [conversion, *(conversion.replace(first, other) for other in others)]

    def convert(self, model, conversion, read, quantizer=None):
        """`{parameter: tensor}` of one conversion.

        Args:
            model (`PreTrainedModel`): the skeleton.
            conversion (`str`): a key of `keys`.
            read (`Callable[[str], torch.Tensor]`): the tensor of a key.
            quantizer (`HfQuantizer`, *optional*): what factorizes the parameters it knows.
        """
        sources = self.keys[conversion]
        key, pattern = sources[0]
        rule = WeightRenaming(key, conversion) if pattern is None else copy.deepcopy(self._rules[pattern])
        if quantizer is not None and quantizer.param_needs_quantization(model, conversion):
            rule.quantization_operation = quantizer.get_quantize_ops()
        for key, pattern in sources:
            rule.add_tensor(
                conversion, key, pattern or key, functools.partial(_cast, read, key, self._dtypes[conversion])
            )
        made = rule.convert(conversion, model=model, config=model.config, hf_quantizer=quantizer)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _cast(read, key, dtype):
    return read(key).to(dtype)


def parameter_shapes(model, keys, key_mapping=None, quantizer=None):
    """What loading `keys` into `model` makes of them, after transformers' own renaming and merging.

    Args:
        model, keys, key_mapping, quantizer: as of [`Conversions`]; `keys` may be a dict with their shapes.

    Returns:
        `dict[str, tuple | None]`: by the name of a parameter its shape, where it is one tensor of a known shape.
    """
    conversions = Conversions(model, keys, key_mapping, quantizer)
    shapes = keys if isinstance(keys, dict) else {}
    found = {}
    for made in (conversions.keys, conversions.unexpected):
        for conversion, sources in made.items():
            (key, pattern), alone = sources[0], len(sources) == 1
            shape = shapes.get(key) if alone and pattern is None else None
            found.update(dict.fromkeys(conversions.names(conversion), shape))
    return found


def check_complete(model, dense_sites, shapes, packed=False):
    """Refuse a checkpoint whose config says of a factorized layer anything else than its weights.

    Args:
        model (`PreTrainedModel`): the skeleton that the config describes.
        dense_sites (`list[Site]`): the sites that stay dense.
        shapes (`dict`): from [`parameter_shapes`].
        packed (`bool`, defaults to `False`): whether an inner quantizer packs tensors, whose shapes are its own.

    Raises:
        CheckpointError: a factor that is missing, of another shape, or not mentioned in the config.
    """
    found, known = factorized(model), set(model.state_dict())
    expected = {site: kind.stored(model, site, bias=True) for site, kind in found.items()}
    missing = sorted(name for stored in expected.values() for name in stored if name not in shapes)
    stray = sorted(
        site.name
        for site in dense_sites
        if site.weight_name not in shapes and any(_belongs(name, site.name) for name in shapes)
    )
    surplus = sorted(
        name for name in shapes if name not in known and any(name.startswith(f"{site}.") for site in expected)
    )
    differing = sorted(
        name
        for stored in expected.values()
        for name, tensor in stored.items()
        if not packed and shapes.get(name) not in (None, tuple(tensor.shape))
    )
    if missing or stray or surplus or differing:
        raise CheckpointError(
            "The checkpoint is damaged: its config and its weights do not agree on "
            f"{(missing or stray or surplus or differing)[0]} ({len(missing)} factors are missing, {len(stray)} "
            f"layers are factorized in the weights only, {len(surplus)} tensors are of no factor, {len(differing)} "
            "have another shape). Download or save it again."
        )


def check_integers(model):
    """Refuse a checkpoint whose integers no factorized layer can hold.

    Args:
        model (`PreTrainedModel`): loaded; what is kept on disk is not looked at.

    Raises:
        CheckpointError: an order that is no permutation, places that do not exist.
    """
    for name, module in model.named_modules():
        if isinstance(module, FormatLinear) and not any(buffer.is_meta for buffer in module.buffers()):
            module.check_integers(name)


def _belongs(name, site):
    return name.startswith((f"{site}.", f"{site}_"))
