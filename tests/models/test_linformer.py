import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

import hf_lowrank
from hf_lowrank import (
    ConfigError,
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerModel,
    LowRankConfig,
)


SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
SHARINGS = ["none", "headwise", "key_value", "layerwise"]


def make(cls=LinformerModel, **options):
    torch.manual_seed(0)
    return cls(LinformerConfig(**{**SIZES, "projected_length": 6, **options})).eval()


def ids(length, batch=2):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def projections(model):
    return {name: p for name, p in model.named_parameters() if "projection" in name}


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_the_identity_as_projection_it_is_bert(sharing, attention):
    model = make(projected_length=24, sharing=sharing, attn_implementation=attention)
    bert = BertModel(BertConfig(**SIZES)).eval()
    assert not bert.load_state_dict(model.state_dict(), strict=False).missing_keys
    for weight in projections(model).values():
        weight.data = torch.eye(24).expand(weight.shape).clone()
    x = ids(24)
    torch.testing.assert_close(model(x).last_hidden_state, bert(x).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_a_strided_start_a_sequence_of_up_to_k_tokens_meets_bert(sharing, attention):
    model = make(sharing=sharing, projection_start="strided", attn_implementation=attention)
    bert = BertModel(BertConfig(**SIZES)).eval()
    bert.load_state_dict(model.state_dict(), strict=False)
    for length in (1, 3, 6):
        torch.testing.assert_close(model(ids(length))[0], bert(ids(length))[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids(7))[0], bert(ids(7))[0], atol=1e-3)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]])
    found, expected = (m(ids(7), attention_mask=mask)[0] for m in (model, bert))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(model(ids(7), attention_mask=torch.zeros_like(mask))[0]).all()
    for weight in projections(model).values():
        assert torch.equal(weight.sum(-2), torch.ones(weight.shape[:-2] + (24,))), "every token once"


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padding_contributes_nothing_and_a_shorter_input_is_the_padded_one(sharing):
    model = make(sharing=sharing)
    x = ids(9)
    alone = model(x).last_hidden_state
    for width in (10, 24):
        for filler in (0, 7):
            padded = torch.cat([x, torch.full((2, width - 9), filler)], dim=1)
            mask = torch.cat([torch.ones(2, 9), torch.zeros(2, width - 9)], dim=1).long()
            found = model(padded, attention_mask=mask).last_hidden_state[:, :9]
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    # Without a mask, what stands there does contribute.
    assert not torch.allclose(model(padded).last_hidden_state[:, :9], alone, atol=1e-3)
    # Each sentence of a batch by itself.
    mask = torch.ones(2, 9).long()
    mask[1, 5:] = 0
    both = model(x, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(both[1:, :5], model(x[1:, :5]).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_projections_are_shared_as_the_paper_has_it():
    counts = {sharing: sum(p.numel() for p in projections(make(sharing=sharing)).values()) for sharing in SHARINGS}
    one = 6 * 24
    assert counts == {"none": 2 * 2 * 4 * one, "headwise": 2 * 2 * one, "key_value": 2 * one, "layerwise": one}
    several = make(sharing="headwise", projected_length=[6, 3])
    assert [p.shape[0] for p in projections(several).values()] == [6, 6, 3, 3]


def test_attention_has_k_columns_and_hidden_states_are_recorded():
    model = make(attn_implementation="eager")
    found = model(ids(9), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in found.attentions] == [(2, 4, 9, 6)] * 2
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 4, 9))
    assert len(found.hidden_states) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"projected_length": 0}, r"`projected_length`=0 must be in 1\.\.24"),
        ({"projected_length": 25}, r"must be in 1\.\.24"),
        ({"projected_length": [6, 6]}, "one entry for each of 2 layers"),
        ({"projected_length": [6], "sharing": "none"}, "one entry for each of 2 layers"),
        ({"sharing": "heads"}, r"`sharing`='heads' of LinformerConfig must be one of"),
        ({"projection_start": "zero"}, "`projection_start`='zero' of LinformerConfig"),
        ({"is_decoder": True}, "Linformer is an encoder"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LinformerConfig(**{**SIZES, "projected_length": 6, **options})


def test_inputs_that_are_refused():
    model = make()
    with pytest.raises(ConfigError, match="has 25 tokens, and the projections are for 24"):
        model(ids(25))
    with pytest.raises(ConfigError, match="which token sees which"):
        model(ids(9), attention_mask=torch.ones(2, 9, 9))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "cls, auto",
    [
        (LinformerModel, AutoModel),
        (LinformerForMaskedLM, AutoModelForMaskedLM),
        (LinformerForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_comes_back_from_disk_bit_for_bit(cls, auto, sharing, tmp_path):
    model = make(cls, sharing=sharing)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is cls
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(ids(9))[0], model(ids(9))[0])
    if cls is LinformerForMaskedLM:
        assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    twin = copy.deepcopy(again)
    for weight in projections(twin).values():
        weight.data.zero_()
    assert not torch.equal(twin(ids(9))[0], model(ids(9))[0]), "a copy has its own projections"
    assert torch.equal(again(ids(9))[0], model(ids(9))[0])


def test_starts_from_a_bert_checkpoint(tmp_path):
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES))
    bert.save_pretrained(tmp_path)
    config = LinformerConfig(**SIZES, projected_length=6)
    model, info = LinformerForSequenceClassification.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == {"bert.sequence_projection.weight"}
    assert torch.equal(
        model.bert.encoder.layer[1].attention.self.key.weight, bert.bert.encoder.layer[1].attention.self.key.weight
    )
    deviation = model.bert.sequence_projection.weight.std().item()
    assert abs(deviation - (2 / 30) ** 0.5) < 0.05


def test_its_linears_become_factors_too(tmp_path):
    model = make(LinformerForSequenceClassification)
    hf_lowrank.factorize(model, LowRankConfig(method="svd", param_ratio=0.5, rank_multiple=1))
    assert {row.name.split(".")[-1] for row in hf_lowrank.summary(model).rows} == {"query", "key", "value", "dense"}
    logits = model(ids(9)).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids(9)).logits, logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_it(tmp_path, checkpointing):
    model = make(LinformerForSequenceClassification).train()
    # Which of two tokens comes first: nothing that a bag of words could tell.
    rows = []
    for i in range(64):
        pair = [5, 9] if i % 2 else [9, 5]
        rows.append({"input_ids": torch.tensor([1, *pair, *[2] * (i % 5)]), "labels": i % 2})

    def collate(batch):
        padded = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}

    arguments = TrainingArguments(
        tmp_path, max_steps=40, per_device_train_batch_size=16, learning_rate=5e-3, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, activation_checkpointing=checkpointing,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in projections(model).items()}
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    model.eval()
    batch = collate(rows)
    labels = batch.pop("labels")
    assert (model(**batch).logits.argmax(-1) == labels).float().mean() > 0.95
    assert all(not torch.equal(p, before[name]) for name, p in projections(model).items())
