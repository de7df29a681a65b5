"""The card of an adapter on a factorized model, or of one that needs this package."""

from peft import get_peft_model_state_dict

from ...readme import TAGS, inherited, rendered, repository
from ..measured import quality


def adapter_card(model, repo_id, evaluation, dense, token, metadata):
    """What `hf_lowrank.model_card` makes of a model with adapters; arguments as there, evaluations as JSON.

    Args:
        model (`PeftModel` or `PreTrainedModel`): with adapters on it.
        repo_id (`str`, *optional*): where the adapters will be found.
        evaluation (`dict`, *optional*): of the model with its adapters.
        dense (`dict`, *optional*): of the model without them.
        token (`str` or `bool`, *optional*): to read the base model's card with.
        metadata (`dict`): entries of the YAML block.
    """
    configs = model.peft_config
    path = next(iter(configs.values())).base_model_name_or_path or getattr(model, "name_or_path", None)
    base = metadata.get("base_model", repository(path))
    model_class = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    data = {
        "library_name": "peft",
        "tags": [*TAGS, *sorted({config.peft_type.value.lower() for config in configs.values()})],
        "base_model": base,
        "base_model_relation": base and "adapter",
        **({} if "license" in metadata else inherited(base or path, token)),
        **metadata,
    }
    return rendered(
        "adapter",
        data,
        title=(repo_id or "Adapter").rpartition("/")[2],
        repo_id=repo_id or "THIS REPOSITORY",
        model_class=model_class,
        subject=f"[{base}](https://huggingface.co/{base})" if base else f"a `{model_class}`",
        quality=quality(evaluation, dense),
        adapters=[_described(model, name, config) for name, config in configs.items()],
    )


def _described(model, name, config):
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    rank = getattr(config, "r", None)
    targets = getattr(config, "target_modules", None)
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    return {
        "name": name,
        "type": config.peft_type.value,
        "rank": "" if rank is None else rank,
        "targets": targets,
        "numbers": f"{sum(tensor.numel() for tensor in state.values()):,}",
    }
