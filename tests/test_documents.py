"""The Python in the documents runs: their names stand for tiny models and texts, in a folder of their own."""

import json
import re
from pathlib import Path

import pytest
import torch
from evaluation.conftest import TEXT, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lowrank


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document):
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader of the documents has at hand: a model and its tokenizer, texts, data, a `Trainer`."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("me/model")
    for folder in ("me/model", "me/model-lowrank"):
        tokenizer.save_pretrained(folder)
    dense = LlamaForCausalLM.from_pretrained("me/model")
    small = LlamaForCausalLM.from_pretrained("me/model")
    hf_lowrank.factorize(
        small, hf_lowrank.LowRankConfig(method="svd", param_ratio=0.6, rank_multiple=1, format="low_rank")
    )
    small.save_pretrained("me/model-lowrank")
    Path("text.txt").write_text(TEXT * 4)
    Path("domain.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(8)))
    item = {"question": "The cat sat on the", "choices": ["mat", "river"], "label": 0}
    Path("piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for _ in range(4)))
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:32])
    data = [{"input_ids": ids, "labels": ids}] * 4
    args = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM, "LowRankConfig": hf_lowrank.LowRankConfig, "Trainer": Trainer,
        "args": args, "data": data, "dense": dense, "hf_lowrank": hf_lowrank, "model_id": "me/model",
        "model": LlamaForCausalLM.from_pretrained("me/model"), "texts": [TEXT] * 8, "tokenizer": tokenizer,
    }  # fmt: skip


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name)])
def test_the_blocks_of_a_document_run_in_their_order(document, names):
    for number, block in enumerate(blocks(document)):
        exec(compile(block, f"{document}, block {number}", "exec"), names)


def test_every_error_has_a_row_and_links_lead_somewhere():
    errors = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name, kind in vars(hf_lowrank.errors).items():
        if isinstance(kind, type) and kind is not hf_lowrank.LowRankError:
            assert f"`{name}`" in errors, f"docs/errors.md does not tell of {name}"
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document} leads to {target}"
