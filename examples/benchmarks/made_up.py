"""A random encoder of two layers and a task made of random words, to see that a benchmark runs."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
OTHERS = [f"word{i}" for i in range(40)]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def encoder(folder):
    """Save the encoder with its tokenizer in `folder`, and return that."""
    torch.manual_seed(0)
    words = [*SPECIAL.values(), *GOOD, *BAD, *OTHERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def sentiment(folder, name="sst2", train=256, validation=64):
    """Write a task with the columns of SST-2 to `folder`, whose sentences are told apart by one word each."""
    source = random.Random(0)
    target = Path(folder) / "glue" / name
    target.mkdir(parents=True)
    for part, count in (("train", train), ("validation", validation)):
        rows = []
        for i in range(count):
            words = [*source.choices(OTHERS, k=source.randint(3, 8)), source.choice((BAD, GOOD)[i % 2])]
            source.shuffle(words)
            rows.append(json.dumps({"sentence": " ".join(words), "label": i % 2}))
        (target / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Path(folder)
