"""Models with low rank in their architecture, pushed to a hub over HTTP and pulled from it."""

import pytest


MODELS = {
    "linformer": "LinformerConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, "
    "intermediate_size=48, max_position_embeddings=24, projected_length=6)",
    "lama": "LamaConfig(vocab_size=50, embedding_size=16, hidden_size=12, num_heads=2)",
}


@pytest.mark.parametrize("name", MODELS)
def test_pushed_and_pulled(hub, worker, name):
    worker.run(f"""
from transformers import AutoModelForSequenceClassification
made = AutoModelForSequenceClassification.from_config(hf_lowrank.{MODELS[name]})
made.push_to_hub("me/{name}")
again = AutoModelForSequenceClassification.from_pretrained("me/{name}")
assert type(again) is type(made)
assert torch.equal(logits(again), logits(made))
""")
    assert {"config.json", "model.safetensors"} <= set(hub.repositories[f"me/{name}"])
