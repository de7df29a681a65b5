import pytest
import torch

from hf_lowrank import FORMATS, LowRankConfig, factorize, summary
from hf_lowrank.testing import tiny_model


def test_counts_every_parameter_and_byte(tmp_path):
    dense, _ = tiny_model("gpt2")
    numbers = sum(p.numel() for p in dense.parameters())
    model, _ = tiny_model("gpt2")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5))
    report = summary(model)
    assert report.dense_parameters == numbers
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.dense_bytes == 4 * numbers
    assert report.bytes == 4 * report.parameters
    assert len(report.rows) == 8
    assert all(0 < row.relative_error < 1 for row in report.rows)
    assert "transformer.h.0.attn.c_attn" in str(report)
    assert report.line in str(report)
    assert f"{report.dense_bytes / report.bytes:.2f}x smaller" in report.line


def test_relative_error_is_the_frobenius_error_of_svd():
    dense, _ = tiny_model("llama")
    model, _ = tiny_model("llama")
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5))
    for row in summary(model).rows:
        weight = dense.get_submodule(row.name).weight
        difference = weight - model.get_submodule(row.name).dense_weight()
        assert abs((difference.norm() / weight.norm()).item() - row.relative_error) < 1e-4


def test_a_dense_model_has_an_empty_table():
    model, _ = tiny_model("llama")
    report = summary(model)
    assert report.rows == []
    assert report.parameters == report.dense_parameters


def test_experts_count_all_copies():
    model, _ = tiny_model("mixtral")
    dense = sum(p.numel() for p in model.parameters())
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, target_modules=".*experts.*"))
    report = summary(model)
    assert report.dense_parameters == dense
    assert {row.shape for row in report.rows} == {"4 x 192 x 64", "4 x 64 x 96"}
    assert torch.isfinite(model(input_ids=torch.arange(3, 9)[None]).logits).all()


@pytest.mark.parametrize("format", FORMATS.names())
def test_dense_bytes_are_of_the_dtype_of_the_weights(format):
    model, _ = tiny_model("llama")
    model.to(torch.bfloat16)
    size = 2 * sum(p.numel() for p in model.parameters())
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, format=format))
    report = summary(model)
    assert report.dense_bytes == size
    for row in report.rows:
        assert row.dense_bytes == 2 * row.dense_parameters
        assert row.rank < row.break_even
