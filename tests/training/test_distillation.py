import copy

import pytest
import torch
from transformers import TrainingArguments

from hf_lowrank import ConfigError, LowRankConfig, factorize
from hf_lowrank.testing import tiny_model
from hf_lowrank.training import Distillation, DistillationTrainer


def examples(count=16):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (count, 12), generator=generator)]


def train(folder, student, teacher, distillation=None, steps=40, accumulate=1, batch=4):
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, arguments, train_dataset=examples(), teacher=teacher, distillation=distillation
    )
    trainer.train()
    return trainer


def divergence(student, teacher):
    batch = torch.stack([example["input_ids"] for example in examples()])
    with torch.no_grad():
        p, q = (model.eval()(batch).logits.log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def pair():
    teacher, _ = tiny_model("llama")
    student = factorize(copy.deepcopy(teacher), LowRankConfig(method="svd", param_ratio=0.4, rank_multiple=1))
    return student, teacher


@pytest.mark.parametrize(
    "distillation",
    [None, Distillation(logits=0.0, hidden=1.0), Distillation(hidden=0.5, contrastive=0.1)],
)
def test_the_student_comes_closer_and_the_teacher_stays(pair, tmp_path, distillation):
    student, teacher = pair
    before, state = divergence(student, teacher), copy.deepcopy(teacher.state_dict())
    train(tmp_path, student, teacher, distillation)
    assert divergence(student, teacher) < 0.8 * before
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


def test_the_task_loss_is_the_models_own(pair, tmp_path):
    student, teacher = pair
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    alone = Distillation(task=2.0, logits=0.0)
    trainer = DistillationTrainer(student, arguments, teacher=teacher, distillation=alone)
    ids = torch.stack([example["input_ids"] for example in examples(3)])
    loss, outputs = trainer.compute_loss(student, {"input_ids": ids, "labels": ids}, return_outputs=True)
    torch.testing.assert_close(loss, 2 * outputs.loss)


def test_accumulated_micro_batches_are_one_batch(pair, tmp_path):
    student, teacher = pair
    twin = copy.deepcopy(student)
    train(tmp_path / "one", student, teacher, steps=2, batch=8)
    train(tmp_path / "two", twin, teacher, steps=2, batch=4, accumulate=2)
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_another_vocabulary_is_refused(pair, tmp_path):
    student, teacher = pair
    teacher.resize_token_embeddings(50)
    with pytest.raises(ConfigError, match=r"`teacher` predicts \(4, 12, 50\), the model \(4, 12, 96\)"):
        DistillationTrainer(
            student, TrainingArguments(tmp_path, report_to=[], use_cpu=True), teacher=teacher
        ).compute_loss(student, {"input_ids": torch.randint(3, 40, (4, 12))})


@pytest.mark.parametrize("options", [{"logits": -1}, {"temperature": 0}, {"logits": 0.0}, {"contrastive": -0.1}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError, match="Distillation"):
        Distillation(**options)


def test_what_the_losses_asked_for_is_no_prediction(pair, tmp_path):
    shapes = []

    def measure(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    student, teacher = pair
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    options = {"eval_dataset": examples(8), "compute_metrics": measure, "distillation": Distillation(hidden=0.1)}
    DistillationTrainer(student, arguments, teacher=teacher, **options).evaluate()
    assert shapes == [(8, 12, 96)]


@pytest.mark.parametrize("distillation", [Distillation(), Distillation(hidden=1.0, contrastive=1.0)])
def test_padding_of_a_decoder_does_not_count(tmp_path, distillation):
    """Whatever the encoder's mask is, and of whatever length."""
    teacher, _ = tiny_model("t5")
    student = factorize(copy.deepcopy(teacher), LowRankConfig(method="svd", param_ratio=0.4, rank_multiple=1))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = DistillationTrainer(student.eval(), arguments, teacher=teacher, distillation=distillation)
    generator = torch.Generator().manual_seed(0)
    for length in (6, 9):
        ids = torch.randint(3, 90, (3, length), generator=generator)
        labels = torch.randint(3, 90, (3, 6), generator=generator)
        labels[:, 2:] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            padded = trainer.compute_loss(student, {**batch, "labels": labels})
            cut = trainer.compute_loss(student, {**batch, "labels": labels[:, :2].contiguous()})
        torch.testing.assert_close(padded, cut, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"logits": "1.0"}, {"task": True}, {"temperature": float("inf")}, {"hidden": float("nan")}]
)
def test_weights_are_finite_numbers(options):
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}`="):
        Distillation(**options)


def test_losses_that_would_not_be_computed_are_refused(pair, tmp_path):
    student, teacher = pair
    smooth = TrainingArguments(tmp_path, report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="`label_smoothing_factor` would be ignored"):
        DistillationTrainer(student, smooth, teacher=teacher)
    plain = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="`compute_loss_func` would be ignored"):
        DistillationTrainer(student, plain, teacher=teacher, compute_loss_func=lambda *_, **__: 1 / 0)
    trainer = DistillationTrainer(student, plain, teacher=teacher, distillation=Distillation(task=1.0))
    batch = {"input_ids": torch.stack([example["input_ids"] for example in examples()])}
    with pytest.raises(ConfigError, match=r"computes none for batches of \['input_ids'\]; give `labels`"):
        trainer.compute_loss(student, batch)
