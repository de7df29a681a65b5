"""Checkpoints that transformers saved, through the names and loaders of vLLM's layers: the same logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import LowRankConfig, collect_statistics, factorize, fold_order
from hf_lowrank.integrations.vllm.pieces import FORMATS as SERVED
from hf_lowrank.testing import tiny_model

from .served import PACKED, logits, outputs, serve


CHECKPOINTS = sorted(
    folder
    for folder in (Path(__file__).parents[2] / "checkpoints").iterdir()
    # Convolutions are of models that vLLM has other code for.
    if folder.name.rpartition("_v")[0] in SERVED and not folder.name.endswith("_conv")
)
JOINT = {"name": "basis_sharing", "joint_groups": list(PACKED.values())}
CASES = {
    "low_rank": {"format": "low_rank"},
    "pivoted": {"format": "pivoted"},
    "some dense": {"format": "low_rank", "rank_pattern": {"k_proj": "dense", "up_proj": "dense"}},
    "some dense, pivoted": {"format": "pivoted", "rank_pattern": {"q_proj": "dense", "1.mlp.gate_proj": "dense"}},
    "one basis for a fused layer": {"method": {**JOINT, "share_layers": 1}},
    "one basis for two layers": {"method": "basis_sharing"},
    "one basis for two fused layers": {"method": JOINT},
    "new biases": {"method": "feature_pca"},
    "new biases, some dense": {"method": "feature_pca", "rank_pattern": {"v_proj": "dense", "gate_proj": "dense"}},
}


def saved(folder, architecture="llama", folded=False, **options):
    model, inputs = tiny_model(architecture)
    model = model.double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    statistics = collect_statistics(model, [inputs()], method=options.get("method", "feature_pca"))
    config = LowRankConfig(**{"method": "svd", "param_ratio": 0.6, "rank_multiple": 1, **options})
    factorize(model, config, calibration=statistics)
    if folded:
        assert fold_order(model, inputs())
    model.save_pretrained(folder, max_shard_size="40KB")
    return outputs(AutoModelForCausalLM.from_pretrained(folder))


# Two key and value heads: four processes hold each of them twice.
@pytest.mark.parametrize("case", CASES)
def test_logits_for_any_number_of_processes(vllm, case, tmp_path):
    expected = saved(tmp_path, **CASES[case])
    for size in (1, 2, 4):
        torch.testing.assert_close(logits(tmp_path, serve(tmp_path, size)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("format", ["low_rank", "pivoted"])
def test_biases_of_the_architecture(vllm, format, tmp_path):
    expected = saved(tmp_path, "qwen2", format=format, rank_pattern={"k_proj": "dense"})
    for size in (1, 2, 4):
        ranks = serve(tmp_path, size, qkv_bias=True)
        torch.testing.assert_close(logits(tmp_path, ranks), expected, rtol=0, atol=1e-10)


def test_channels_that_were_reordered(vllm, tmp_path):
    expected = saved(tmp_path, format="pivoted", folded=True)
    for size in (1, 2, 4):
        torch.testing.assert_close(logits(tmp_path, serve(tmp_path, size)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["some dense, pivoted", "new biases", "one basis for two fused layers"])
def test_model_classes_that_load_by_name(vllm, case, tmp_path):
    expected = saved(tmp_path, **CASES[case])
    torch.testing.assert_close(logits(tmp_path, serve(tmp_path, 2, "by name")), expected, rtol=0, atol=1e-10)


def test_modules_that_vllm_has_under_another_name(vllm, tmp_path):
    expected = saved(tmp_path, **CASES["one basis for two fused layers"])
    ranks = serve(tmp_path, 2, root="language_model", prefixes={"model.": "language_model."})
    torch.testing.assert_close(logits(tmp_path, ranks), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_every_published_checkpoint(vllm, folder):
    expected = torch.tensor([float(line) for line in (folder / "logits.txt").read_text().split()])
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits.flatten(), expected)
    for size in (1, 2):
        torch.testing.assert_close(logits(folder, serve(folder, size)), outputs(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["low_rank", "some dense, pivoted", "one basis for a fused layer"])
def test_layers_take_what_their_checkpoint_takes(vllm, case, tmp_path):
    saved(tmp_path, **CASES[case])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for mine, theirs in zip(serve(tmp_path)[0].layers, model.model.layers, strict=True):
        numbers = sum(p.numel() for name, p in theirs.named_parameters() if "_proj" in name)
        assert sum(p.numel() for p in mine.parameters()) == numbers
        assert all(p.is_contiguous() and not p.requires_grad for p in mine.parameters())
