"""all-MiniLM-L6-v2: a full-precision encoder; sentences must stay close to where they were."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_lowrank import Calibration, LowRankConfig, summary


pytestmark = pytest.mark.real
SENTENCES = [
    "The cat sat on the mat.", "A feline rested on a rug.", "Interest rates rose again this quarter.",
    "Central banks keep tightening.", "He plays the violin beautifully.", "The train to Berlin leaves at noon.",
]  # fmt: skip


def embed(model, tokenizer):
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_calibrated_on_texts_padded_batches_and_reloaded(minilm, data, tmp_path):
    import json

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    lines = (data / "calib_wikipedia" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [json.loads(line)["text"] for line in lines]
    padded = [
        dict(tokenizer(texts[i : i + 8], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, 64, 8)
    ]
    dense = embed(AutoModel.from_pretrained(minilm), tokenizer)
    plain = LowRankConfig(method="svd", param_ratio=0.8)
    by_text = LowRankConfig(
        method="whitened_svd", param_ratio=0.8, calibration=Calibration(texts, samples=32, length=128)
    )
    by_batch = LowRankConfig(method="whitened_svd", param_ratio=0.8, calibration=padded)
    similarity = {}
    for name, config in (("plain", plain), ("text", by_text), ("batch", by_batch)):
        model = AutoModel.from_pretrained(minilm, lowrank_config=config)
        similarity[name] = (embed(model, tokenizer) * dense).sum(-1).mean().item()
    assert similarity["text"] > similarity["plain"] + 0.1
    assert similarity["batch"] > similarity["plain"] + 0.1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(embed(again, AutoTokenizer.from_pretrained(tmp_path)), embed(model, tokenizer))
    assert len(summary(again).rows) == 6 * 6 + 1
