import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import ModelOutput

import hf_lowrank
from hf_lowrank import ConfigError, LamaConfig, LamaForSequenceClassification, LamaModel, LamaPooler, LowRankConfig


BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
GRU = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 12}
CONTEXTS = ["learned", "mean", "cls", "last"]


def ids(length, batch=3):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def make(cls, recurrent, **options):
    torch.manual_seed(0)
    sizes = GRU if recurrent else {"encoder": BertConfig(**BERT)}
    return cls(LamaConfig(**sizes, num_heads=4, **options)).eval()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("l2_norm", [True, False])
def test_rows_of_attention_sum_to_one_and_padding_has_none(context, l2_norm):
    pooler = LamaPooler(6, 4, context, l2_norm)
    states, mask = torch.randn(3, 7, 6), torch.ones(3, 7)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    pooled, attention = pooler(states, mask)
    assert pooled.shape == (3, 24)
    assert attention.shape == (3, 4, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4))
    assert not attention[0, :, 4:].any() and not attention[1, :, :2].any()
    torch.testing.assert_close(pooled[:1], pooler(states[:1, :4])[0])
    torch.testing.assert_close(pooled[1:2], pooler(states[1:2, 2:])[0])
    torch.testing.assert_close(pooled[0].view(4, 6)[2], attention[0, 2] @ states[0])


def test_it_is_what_the_equation_says():
    pooler = LamaPooler(6, 4, "mean", l2_norm=True)
    states = torch.randn(1, 7, 6)
    context = states[0].mean(0)
    affinity = torch.stack([(context @ pooler.left) * (h @ pooler.right) for h in states[0]])
    affinity = (affinity / affinity.norm(dim=1, keepdim=True)).tanh()
    weights = affinity.softmax(0).T
    torch.testing.assert_close(pooler(states)[0][0], (weights @ states[0]).flatten())


@pytest.mark.parametrize("l2_norm", [True, False])
def test_with_a_learned_context_the_first_factor_says_nothing(l2_norm):
    """P^T c is one number a head: it moves into Q, and what is left of P and c is the same for any model."""
    pooler, collapsed = (LamaPooler(6, 4, "learned", l2_norm) for _ in range(2))
    with torch.no_grad():
        collapsed.right.copy_(pooler.right * (pooler.context @ pooler.left))
        collapsed.left.fill_(1 / 6)
        collapsed.context.fill_(1)
    states = torch.randn(3, 7, 6)
    for one, other in zip(pooler(states), collapsed(states), strict=True):
        torch.testing.assert_close(one, other)
    # A context of the input tells sequences apart that a constant one cannot.
    pooler = LamaPooler(6, 4, "mean", l2_norm)
    states[1, 0] = states[0, 0]
    scales = pooler._context(states, torch.ones(3, 7).bool()) @ pooler.left
    assert not torch.allclose(scales[0], scales[1])


def test_numbers():
    for context in CONTEXTS:
        count = sum(p.numel() for p in LamaPooler(6, 4, context).parameters())
        assert count == 2 * 6 * 4 + (6 if context == "learned" else 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 0}, "`num_heads`=0 of LAMA must be an integer"),
        ({"context": "max"}, "`context`='max' of LAMA must be one of"),
        ({"dropout": 1.0}, "`dropout`=1.0 of LamaConfig"),
        ({"encoder": {"model_type": "t5"}}, "with a decoder"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LamaConfig(**options)


def test_a_sequence_of_padding_is_refused():
    with pytest.raises(ConfigError, match="all padding"):
        LamaPooler(6, 4)(torch.randn(2, 3, 6), torch.tensor([[1, 1, 1], [0, 0, 0]]))


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_on_the_right_changes_nothing(recurrent, context):
    model = make(LamaForSequenceClassification, recurrent, context=context)
    x = ids(6)
    alone = model(x, attention_mask=torch.ones_like(x)).logits
    padded, mask = torch.cat([x, torch.full((3, 4), 7)], 1), torch.cat([torch.ones(3, 6), torch.zeros(3, 4)], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, rtol=1e-5, atol=1e-5)
    if recurrent:
        left = torch.cat([torch.full((3, 4), 7), x], 1)
        torch.testing.assert_close(model(left, attention_mask=mask.flip(1)).logits, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x).logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize(
    "cls, auto", [(LamaModel, AutoModel), (LamaForSequenceClassification, AutoModelForSequenceClassification)]
)
def test_comes_back_from_disk_bit_for_bit(recurrent, cls, auto, tmp_path):
    model = make(cls, recurrent, context="mean", l2_norm=False)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is cls
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (again.config.context, again.config.l2_norm) == ("mean", False)
    mask = torch.ones(3, 6)
    mask[0, 4:] = 0
    given = {"input_ids": ids(6), "attention_mask": mask}
    key = "logits" if cls is LamaForSequenceClassification else "pooler_output"
    assert torch.equal(again(**given)[key], model(**given)[key])


def test_a_pretrained_encoder_keeps_its_weights(tmp_path):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**BERT)).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = LamaForSequenceClassification.from_encoder(str(tmp_path / "bert"), num_heads=2, num_labels=3).eval()
    states = bert(ids(6)).last_hidden_state
    assert torch.equal(model.lama(ids(6)).last_hidden_state, states)
    assert model.classifier.weight.shape == (3, 64)
    hf_lowrank.factorize(bert, LowRankConfig(method="svd", param_ratio=0.5)).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="is factorized or quantized"):
        LamaForSequenceClassification.from_encoder(str(tmp_path / "small"))
    model.save_pretrained(tmp_path / "lama")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lama")
    assert torch.equal(again(ids(6)).logits, model(ids(6)).logits)


def test_its_encoder_becomes_factors(tmp_path):
    model = make(LamaForSequenceClassification, False)
    hf_lowrank.factorize(model, LowRankConfig(method="svd", param_ratio=0.5, rank_multiple=1))
    names = {row.name for row in hf_lowrank.summary(model).rows}
    assert names and all(name.startswith("lama.encoder.encoder") or "pooler" in name for name in names)
    logits = model(ids(6)).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids(6)).logits, logits)


@pytest.mark.parametrize("recurrent, checkpointing", [(True, False), (False, True)])
def test_trainer_trains_it(recurrent, checkpointing, tmp_path):
    torch.manual_seed(0)
    model = make(LamaForSequenceClassification, recurrent).train()
    rows = []
    for i in range(64):
        pair = [5, 9] if i % 2 else [9, 5]
        rows.append({"input_ids": torch.tensor([1, *pair, *[2] * (i % 5)]), "labels": i % 2})

    def collate(batch):
        padded = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}

    arguments = TrainingArguments(
        tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=1e-2 if recurrent else 5e-3,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, activation_checkpointing=checkpointing,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    batch = collate(rows)
    labels = batch.pop("labels")
    assert (model.eval()(**batch).logits.argmax(-1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("cls", [LamaModel, LamaForSequenceClassification])
def test_what_a_gru_does_not_read_is_refused_by_name(cls):
    model = make(cls, True)
    for given, match in (
        ({"nonsense": 3, "position_ids": ids(6)}, r"does not know \['nonsense', 'position_ids'\]; it reads"),
        ({"output_hidden_states": True}, "`output_hidden_states`=True asks for the states between"),
        ({"output_hidden_states": True, "nonsense": 3}, "`output_hidden_states`=True"),
    ):
        with pytest.raises(ConfigError, match=match):
            model(ids(6), **given)
    # What tokenizers, PEFT and callers of any model pass.
    passed = {"token_type_ids": torch.zeros_like(ids(6)), "output_attentions": True, "output_hidden_states": False}
    found = model(ids(6), **passed, return_dict=None, nonsense=None)
    assert torch.equal(found[0], model(ids(6))[0])
    assert found.attentions[0].shape == (3, 4, 6)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("cls", [LamaModel, LamaForSequenceClassification])
def test_outputs_are_tuples_where_they_are_asked_for(recurrent, cls):
    model = make(cls, recurrent)
    expected = model(ids(6))
    assert isinstance(expected, ModelOutput)

    def same(found):
        assert type(found) is tuple and len(found) == len(expected.to_tuple())
        assert torch.equal(found[0], expected[0]) and torch.equal(found[-1][0], expected.attentions[0])

    same(model(ids(6), return_dict=False))
    model.config.return_dict = False
    same(model(ids(6)))
    assert isinstance(model(ids(6), return_dict=True), ModelOutput)
    model.config.return_dict = True
    if not recurrent:
        model.base_model.encoder.config.return_dict = False
        assert torch.equal(model(ids(6))[0], expected[0])
        shown = model(ids(6), output_hidden_states=True, output_attentions=True)
        assert [states.shape for states in shown.hidden_states] == [(3, 6, 32)] * 3
        assert [weights.shape for weights in shown.attentions] == [(3, 4, 6)], "the pooler's"


def test_the_number_of_items_scales_the_loss_as_in_transformers():
    model, labels = make(LamaForSequenceClassification, True), torch.tensor([0, 1, 1])
    mean = model(ids(6), labels=labels).loss
    torch.testing.assert_close(model(ids(6), labels=labels, num_items_in_batch=6).loss, mean / 2)
    torch.testing.assert_close(model(ids(6), labels=labels, return_dict=False)[0], mean)


@pytest.mark.parametrize("recurrent", [True, False])
def test_accumulated_batches_are_one(recurrent, tmp_path):
    """`Trainer` divides the loss of a part of a batch exactly where a model does not do so itself."""
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids(5, 8))]
    trained = []
    for size, parts in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts, use_cpu=True,
            learning_rate=0.1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = make(LamaForSequenceClassification, recurrent)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append(model.classifier.weight.detach())
    torch.testing.assert_close(*trained)


def test_half_precision_counts_and_adds_every_token():
    mask = torch.ones(1, 257).bool()
    one, many = torch.zeros(1, 257, 2, dtype=torch.bfloat16), torch.full((1, 257, 2), 256.0, dtype=torch.float16)
    one[:, 0] = 1
    assert torch.equal(LamaPooler(2, 1, "mean")._context(one, mask), torch.full((1, 2), 1 / 257).bfloat16())
    assert torch.equal(LamaPooler(2, 1, "mean")._context(many, mask), many[:, 0]), "the sum is beyond float16"


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("cls", [LamaModel, LamaForSequenceClassification])
def test_a_row_that_is_all_padding_is_refused_by_the_models(recurrent, cls):
    mask = torch.ones(3, 6)
    mask[1] = 0
    with pytest.raises(ConfigError, match="all padding"):
        make(cls, recurrent)(ids(6), attention_mask=mask)


@pytest.mark.parametrize("cls", [LamaModel, LamaForSequenceClassification])
def test_gradient_checkpointing_is_the_encoders(cls):
    model = make(cls, False)
    assert model.supports_gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    recurrent = make(cls, True)
    assert not recurrent.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        recurrent.activation_checkpointing_enable()


def test_without_a_padding_token_every_embedding_is_trained():
    assert LamaConfig().pad_token_id == 0
    model = make(LamaModel, True, pad_token_id=None)
    assert model.encoder.embeddings.padding_idx is None and model.encoder.embeddings.weight[0].any()
    assert not make(LamaModel, True).encoder.embeddings.weight[0].any()
