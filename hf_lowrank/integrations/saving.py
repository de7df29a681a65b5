"""What a model is saved as: what it holds by then, whoever made it and whoever else shares its config."""

import functools
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..errors import ConfigError
from ..surgery import factorized
from .config import QUANT_METHOD, LowRankConfig
from .inner import method_of
from .quantizer import LowRankQuantizer, attach


def install_saving():
    """Let every `save_pretrained` describe the model as it stands; idempotent."""
    original = PreTrainedModel.save_pretrained
    if hasattr(original, "lowrank_saving"):
        return

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        with described(self):
            return original(self, *args, **kwargs)

    save_pretrained.lowrank_saving = True
    PreTrainedModel.save_pretrained = save_pretrained


@contextmanager
def described(model):
    """Inside, config and quantizer of `model` tell of its own factors, and of nothing else.

    Parts of a model may be factorized, and multiplied out, by themselves; parts of a factorized one may be saved; and
    a config may be that of several models. So what stands in them is not believed.

    Args:
        model (`PreTrainedModel`): about to be saved.

    Raises:
        ConfigError: factors beside weights that another quantizer has packed.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    quantizers = [getattr(part, "hf_quantizer", None) for part in parts]
    own, held = quantizers[0], factorized(model)
    configs = {id(part.config): part.config for part in parts}.values()
    before = {id(config): vars(config).get("quantization_config") for config in configs}
    known = [q.quantization_config for q in quantizers if isinstance(q, LowRankQuantizer)]
    known += [found for found in map(_ours, before.values()) if found is not None]
    if not held and not known:
        yield
        return
    if held and own is not None and own.quantization_config.quant_method not in (QUANT_METHOD, "gguf"):
        raise ConfigError(
            f"The model holds {len(held)} factorized layers, such as {next(iter(held))}, and is quantized with "
            f"{method_of(own.quantization_config)}, which cannot be saved together; factorize the model it was made "
            "from, or call hf_lowrank.to_dense(model)."
        )
    for config in configs:
        if _ours(before[id(config)]) is not None:
            del config.quantization_config
    try:
        if not held:
            model.hf_quantizer = None if isinstance(own, LowRankQuantizer) else own
        elif isinstance(own, LowRankQuantizer):
            model.config.quantization_config = own.quantization_config
        else:
            # Of parts that were factorized one by one, nobody knows the whole recipe.
            attach(model, known[0] if known else LowRankConfig(recipe={}, calibration=None))
        yield
    finally:
        for config in configs:
            vars(config).pop("quantization_config", None)
            if before[id(config)] is not None:
                config.quantization_config = before[id(config)]
        model.hf_quantizer = own


def _ours(described):
    """The [`LowRankConfig`] that a `quantization_config` is, or stands for as it was read from a file, or `None`."""
    if described is None or method_of(described) != QUANT_METHOD:
        return None
    return LowRankConfig.from_dict(described) if isinstance(described, dict) else described
