"""Keep stacks without this package from loading factorized weights into a randomly initialised dense model.

transformers skips a quantization method it does not know and initialises whatever the checkpoint does not hold. A
factorized config.json therefore carries a sentence in two places where loading looks first, and stops quoting it:
`transformers_weights`, the name of the weight file (since 4.53; with the plugin, the quantizer takes it out before the
file is looked for), and `torch_dtype`, an attribute of torch (before 4.56; later versions read `dtype`). The configs
of parts carry it too: the class of a part reads nothing else of a composite's config.json.
"""

import functools
import json

from transformers import PreTrainedConfig


GUARD = (
    "none without hf_lowrank: this checkpoint is factorized, run `pip install hf-lowrank` "
    "(and `import hf_lowrank` if HF_LOWRANK_AUTOLOAD=0)"
)


def remove_guard(config):
    """Let transformers find the weight files by their ordinary names again."""
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            remove_guard(part)


def install_guard(quant_method):
    """Write the guard into every config.json whose `quantization_config` is `quant_method`; idempotent."""
    original = PreTrainedConfig.to_json_file
    if hasattr(original, "lowrank_guard"):
        return

    # transformers drops `transformers_weights` from a config it saves, so that it has to be added at the file itself.
    @functools.wraps(original)
    def to_json_file(self, json_file_path, use_diff=True):
        described = getattr(self, "quantization_config", None) or {}
        named = described.get("quant_method") if isinstance(described, dict) else described.quant_method
        # transformers takes it out of the whole, not of the parts, which may describe something else by now.
        remove_guard(self)
        if named != quant_method:
            return original(self, json_file_path, use_diff=use_diff)
        content = json.loads(self.to_json_string(use_diff=use_diff))
        _add_guard(content, content.get("dtype"))
        with open(json_file_path, "w", encoding="utf-8") as writer:
            writer.write(json.dumps(content, indent=2, sort_keys=True) + "\n")

    to_json_file.lowrank_guard = True
    PreTrainedConfig.to_json_file = to_json_file


def _add_guard(content, dtype):
    content["transformers_weights"] = GUARD
    # Only beside `dtype`, which then wins over it in every version this package runs on.
    if dtype is not None:
        content.update(dtype=dtype, torch_dtype=GUARD)
    for part in content.values():
        if isinstance(part, dict) and "model_type" in part:
            _add_guard(part, part.get("dtype") or dtype)
