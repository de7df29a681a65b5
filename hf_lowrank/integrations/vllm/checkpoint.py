"""What `quantization_config` of a checkpoint says, and which of its modules stand in one layer of vLLM."""

from .errors import ServingError
from .pieces import FORMATS


QUANT_METHOD = "lowrank"
VERSION = 1
RESAVE = (
    'save the model in another format, with `hf_lowrank.truncate(model, format="low_rank")`, or dense, with '
    "`hf_lowrank.to_dense(model)`"
)


def read_modules(config):
    """`{module: {"format", "rank", ...}}` of a checkpoint, checked.

    Args:
        config (`dict`): `quantization_config` of config.json.

    Raises:
        ServingError: another version, quantized factors, no modules, or a module that cannot be served.
    """
    version = config.get("version")
    if version != VERSION:
        raise ServingError(
            f"This checkpoint has lowrank config version {version!r}, this plugin reads version {VERSION}; install "
            "the hf-lowrank that wrote it beside vLLM."
        )
    if config.get("inner") is not None:
        raise ServingError(
            "The factors of this checkpoint are quantized, and this plugin applies ordinary ones; serve a model that "
            "was factorized without `quantization_config`."
        )
    modules = config.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise ServingError(
            "`quantization_config` names no factorized module: it is a recipe that was not carried out; load the "
            "model with transformers, save it, and serve what was saved."
        )
    for name, spec in modules.items():
        _check(name, spec, modules)
    return {name: dict(spec) for name, spec in modules.items()}


def members(prefix, packed, modules):
    """The modules of the checkpoint that vLLM holds in the layer `prefix`, in vLLM's order.

    Args:
        prefix (`str`): full name of the layer, such as `model.layers.0.self_attn.qkv_proj`.
        packed (`dict[str, list[str]]`): vLLM's `packed_modules_mapping`, `{"qkv_proj": ["q_proj", ...]}`.
        modules (`dict[str, dict]`): what the checkpoint has factorized.

    Returns:
        `dict[str, dict | None]`: what the checkpoint says of each, `None` for a dense one.
    """
    parent, dot, leaf = prefix.rpartition(".")
    names = [f"{parent}{dot}{name}" for name in packed.get(leaf, [leaf])]
    return {name: modules.get(name) for name in names}


def _check(name, spec, modules):
    format = spec.get("format") if isinstance(spec, dict) else None
    if format not in FORMATS:
        raise ServingError(
            f"The checkpoint stores {name} as {spec!r}, and vLLM can be given {sorted(FORMATS)}; {RESAVE}."
        )
    if "out_features" in spec or "in_features" in spec:
        raise ServingError(
            f"{name} has fewer channels than its architecture, for which vLLM makes room; save the model dense, with "
            "`hf_lowrank.to_dense(model)`."
        )
    rank = spec.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ServingError(f"rank={rank!r} of {name} must be a positive integer; download or save the model again.")
    lender = spec.get("basis")
    if lender is not None and (lender not in modules or "basis" in modules[lender]):
        raise ServingError(
            f"{name} borrows the basis of {lender!r}, which has none in this checkpoint; download or save it again."
        )
