"""Texts that several models write after the same prompts."""

from ..errors import ConfigError
from ..reporting import Sample
from .inference import inference


def text_samples(models, tokenizer, prompts, max_new_tokens=48):
    """What causal language models write after some prompts, the likeliest token each time: nothing is drawn.

    Args:
        models (`dict[str, PreTrainedModel]`): by label, as in `{"dense": dense, "factorized": model}`.
        tokenizer (`PreTrainedTokenizer`): of all of them.
        prompts (`list[str]`): what they are given.
        max_new_tokens (`int`, defaults to 48): length of each text at most.

    Returns:
        `list[Sample]`, for the argument `samples` of [`report`].

    Raises:
        ConfigError: no prompt, or one that is no text.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ConfigError(f"`prompts`={prompts!r:.200} must be a list of texts, at least one.")
    return [
        Sample(prompt, {label: _continue(model, tokenizer, prompt, max_new_tokens) for label, model in models.items()})
        for prompt in prompts
    ]


def _continue(model, tokenizer, prompt, max_new_tokens):
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with inference(model) as device:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
