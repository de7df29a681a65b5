"""What a checkpoint holds, read from file headers: no weight is touched."""

from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import load_state_dict

from ..errors import CheckpointError
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


def parameter_names(model, keys, key_mapping=None, quantizer=None):
    """The parameter names of `model` that loading `keys` will fill, after transformers' own renaming and merging."""
    mapping = get_model_conversion_mapping(model, key_mapping, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = set()
    for key in keys:
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name = key
        names.add(name)
        if source is not None:
            # A one-to-many conversion is known by its first target; the others share its prefix.
            converter = next(c for c in converters if source in c.source_patterns)
            names.update(name.replace(converter.target_patterns[0], t) for t in converter.target_patterns[1:])
    return names


def check_complete(model, dense_sites, names):
    """Refuse a checkpoint that lacks a factor, or that holds factors its config does not mention."""
    missing = sorted(
        name
        for site, kind in factorized(model).items()
        for name in kind.stored(model, site, bias=True)
        if name not in names
    )
    stray = sorted(
        site.name
        for site in dense_sites
        if site.weight_name not in names and any(name.startswith((f"{site.name}.", f"{site.name}_")) for name in names)
    )
    if missing or stray:
        raise CheckpointError(
            f"The checkpoint is damaged: its config and its weights do not agree on {(missing or stray)[0]}"
            f" ({len(missing)} factors are missing, {len(stray)} layers are factorized in the weights only). "
            "Download or save it again."
        )
