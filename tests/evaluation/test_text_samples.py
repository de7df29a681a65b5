"""Texts side by side are what the models write."""

import copy

import pytest
import torch

from hf_lowrank import ConfigError, Sample, report, text_samples


PROMPTS = ["The cat sat", "A dog ran to"]


def test_each_model_continues_each_prompt(model, tokenizer):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    samples = text_samples({"one": model, "other": other}, tokenizer, PROMPTS, max_new_tokens=5)
    assert [sample.prompt for sample in samples] == PROMPTS
    for sample in samples:
        for label, writer in (("one", model), ("other", other)):
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
            for _ in range(5):
                ids = torch.cat([ids, writer(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            whole = tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
            assert sample.texts[label] == whole
        assert sample.texts["one"] != sample.texts["other"]
    assert report(model, samples=samples, spectra=False).samples == samples


def test_nothing_about_the_model_changes(model, tokenizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    first = text_samples({"one": model}, tokenizer, PROMPTS, max_new_tokens=3)
    assert model.training
    model.eval()
    assert text_samples({"one": model}, tokenizer, PROMPTS, max_new_tokens=3) == first
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(sample, Sample) for sample in first)


@pytest.mark.parametrize("prompts", ["The cat", [], [""], [3]])
def test_prompts_that_are_none_are_refused(model, tokenizer, prompts):
    with pytest.raises(ConfigError, match="`prompts`=.* must be a list of texts, at least one"):
        text_samples({"one": model}, tokenizer, prompts)
