"""What vLLM makes of `quantization_config`, and asks for every layer."""

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .checkpoint import QUANT_METHOD, members, read_modules
from .errors import ServingError


class LowRankConfig(QuantizationConfig):
    """The factorized modules of one model.

    Args:
        modules (`dict[str, dict]`): `{name: {"format", "rank", ...}}`, checked.
    """

    def __init__(self, modules):
        super().__init__()
        self.modules = modules
        self.holders = {}

    def get_name(self):
        return QUANT_METHOD

    def get_supported_act_dtypes(self):
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls):
        # Ordinary products, on whatever device.
        return -1

    @staticmethod
    def get_config_filenames():
        return []

    @classmethod
    def from_config(cls, config):
        return cls(read_modules(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        names = {name: (hf_to_vllm_mapper.apply_list([name]) or [name])[0] for name in self.modules}
        for spec in self.modules.values():
            if "basis" in spec:
                spec["basis"] = names[spec["basis"]]
        self.modules = {names[name]: spec for name, spec in self.modules.items()}

    def get_quant_method(self, layer, prefix):
        # vLLM loads plugins before its layers, which import half of it; whoever asks here has them.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .method import LowRankLinearMethod

        if isinstance(layer, LinearBase):
            specs = members(prefix, self.packed_modules_mapping, self.modules)
            factorized = any(spec is not None for spec in specs.values())
            return LowRankLinearMethod(specs, self.holders) if factorized else UnquantizedLinearMethod()
        found = [prefix] if prefix in self.modules else []
        if isinstance(layer, RoutedExperts):
            found = [name for name in self.modules if name.startswith(f"{prefix}.")]
        if found:
            raise ServingError(
                f"{found[0]} is factorized, and vLLM applies it with kernels of its own ({type(layer).__name__}); "
                "factorize the model without it (`exclude_modules`), or serve it dense (`hf_lowrank.to_dense(model)`)."
            )
        return None
