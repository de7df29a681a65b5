"""An adapter of ours as a LoRA adapter of the same update: no decomposition, nothing lost."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..integrations.peft_lora.biases import PREFIX
from ._layer import FactorTunerLinear


@torch.no_grad()
def to_lora(model, adapter_name="default"):
    r"""An adapter of `model` as `(peft.LoraConfig, state dict)`; `model` stays as it is.

        lora_B lora_A = left right,    r = R of each layer,    lora_alpha = r, so that LoRA's own scale is 1

    `peft.convert_to_lora` decomposes the update to a rank of your choice; this keeps all of it, at the rank the
    factors have (the sum of the ranks of WaRA's bands).

    Args:
        model (`torch.nn.Module`): a `PeftModel`, or a model with injected adapters of this package.
        adapter_name (`str`, defaults to `"default"`): which one.

    Shapes:
        `lora_A.weight` `(R, in)`, `lora_B.weight` `(out, R)`, under PEFT's names.

    Raises:
        TargetError: no layer of `model` has an adapter of this package by that name.
    """
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, FactorTunerLinear) and adapter_name in module.scaling
    }
    if not layers:
        raise TargetError(
            f"`adapter_name`={adapter_name!r} is no adapter of hf_lowrank in this {type(model).__name__}; it has "
            f"{sorted(getattr(model, 'peft_config', {})) or 'none'}."
        )
    config = model.peft_config[adapter_name]
    # Biases and modules that were trained whole, as PEFT saves them.
    state = {
        key: tensor
        for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if f".{config.name}_" not in key
    }
    ranks = {}
    for name, layer in layers.items():
        left, right = layer.factors(adapter_name)
        ranks[name] = len(right)
        state[f"{PREFIX}{name}.lora_A.weight"] = right.contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = left.contiguous()
    most = max(ranks.values())
    # By itself, a name would also be that of every module it ends.
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    lora = LoraConfig(
        r=most,
        lora_alpha=most,
        lora_dropout=config.lora_dropout,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(layers),
        bias=config.bias.replace(config.name, "lora"),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
    return lora, state


def save_as_lora(folder, model, adapter_name="default"):
    """Write an adapter of `model` as an ordinary LoRA adapter folder, which PEFT loads without this package.

    Args:
        folder (`str` or `os.PathLike`): made if it is not there.
        model (`torch.nn.Module`): as for [`to_lora`].
        adapter_name (`str`, defaults to `"default"`): which one.

    Raises:
        TargetError: as for [`to_lora`].
    """
    config, state = to_lora(model, adapter_name)
    config.inference_mode = True
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
