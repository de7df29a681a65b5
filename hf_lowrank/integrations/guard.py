"""Keep stacks without this package from loading factorized weights into a randomly initialised dense model.

transformers skips a quantization method it does not know and initialises whatever the checkpoint does not hold. What
it does honour, and checks first, is the config key `transformers_weights`, the name of the weight file. A factorized
config.json carries a sentence there instead: without the plugin, loading stops with a ValueError that quotes it;
with the plugin, the quantizer takes it out before the file name is looked at.
"""

import functools

from transformers import PreTrainedConfig


GUARD = (
    "none without hf_lowrank: this checkpoint is factorized, run `pip install hf-lowrank` "
    "(and `import hf_lowrank` if HF_LOWRANK_AUTOLOAD=0)"
)


def remove_guard(config):
    """Let transformers find the weight files by their ordinary names again."""
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights


def install_guard(quant_method):
    """Write the guard into every config.json whose `quantization_config` is `quant_method`; idempotent."""
    original = PreTrainedConfig.to_json_file
    if hasattr(original, "lowrank_guard"):
        return

    # transformers drops the key before saving, on purpose, so that it has to be added at the file itself.
    @functools.wraps(original)
    def to_json_file(self, *args, **kwargs):
        quantization_config = getattr(self, "quantization_config", None)
        if getattr(quantization_config, "quant_method", None) != quant_method:
            return original(self, *args, **kwargs)
        self.transformers_weights = GUARD
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.transformers_weights

    to_json_file.lowrank_guard = True
    PreTrainedConfig.to_json_file = to_json_file
