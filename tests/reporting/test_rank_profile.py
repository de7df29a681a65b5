import json

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from hf_lowrank import ConfigError, NonFiniteError, TargetError, rank_profile
from hf_lowrank.testing import make_weight, tiny_model


def test_counts_what_is_there():
    model, _ = tiny_model("llama")
    layer = model.model.layers[1]
    # Singular values 0.9^i: energies 0.81^i, of which the first r have a share of 1 - 0.81^r in nearly all.
    layer.mlp.up_proj.weight.data = make_weight(96, 64).float()
    pruned = layer.mlp.down_proj.weight.data
    pruned[10:] = 0
    pruned[:, :30] = 0
    pruned[0, 40] = 0
    layer.self_attn.q_proj.weight.data.zero_()
    profile = rank_profile(model)
    assert len(profile.rows) == 14
    rows = {row.name.removeprefix("model.layers."): row for row in profile.rows}
    up, down, q = (rows[f"1.{name}"] for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
    # 0.81^10 > 0.1 > 0.81^11
    assert (up.rank, up.energy_rank, up.zero_rows, up.zero_columns, up.nonzero) == (64, 11, 0, 0, 1.0)
    assert (down.out_features, down.in_features, down.rank) == (64, 96, 10)
    assert (down.zero_rows, down.zero_columns) == (54, 30)
    assert down.nonzero == (10 * 66 - 1) / (64 * 96)
    assert (q.rank, q.energy_rank, q.zero_rows, q.nonzero) == (0, 0, 64, 0)
    half = rank_profile(model, energy=0.5, target_modules=["up_proj"])
    assert [row.energy_rank for row in half.rows][1] == 4
    assert half.rows[0].rank == 64
    assert half.mean("rank") == 1
    assert "model.layers.1.mlp.up_proj" in str(half)
    assert "50% energy" in str(half)
    assert str(profile).endswith("of entries not zero")
    assert json.loads(json.dumps(profile.to_json()))["matrices"][0]["rank"] == 64


def test_rounding_of_the_weight_is_no_rank():
    model, _ = tiny_model("llama")
    weight = make_weight(96, 64, degeneracy="low_rank")
    for dtype in (torch.float32, torch.bfloat16):
        model.model.layers[0].mlp.up_proj.weight.data = weight.to(dtype)
        (row, _) = rank_profile(model, target_modules=["up_proj"]).rows
        # bfloat16 does not hold the smallest of the 32 singular values, 0.9^31 of the largest, as well.
        assert row.rank == 32 if dtype == torch.float32 else 20 < row.rank <= 40


def test_layouts_and_experts():
    model, _ = tiny_model("gpt2")
    model.transformer.h[0].attn.c_attn.weight.data[:, 3] = 0
    row = rank_profile(model).rows[0]
    assert (row.out_features, row.in_features, row.zero_rows, row.zero_columns) == (192, 64, 1, 0)
    model, _ = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[2] = 0
    rows = {row.name: row for row in rank_profile(model, target_modules=".*layers.0.*experts.down_proj").rows}
    assert len(rows) == 4
    assert [rows[f"model.layers.0.mlp.experts.down_proj[{i}]"].rank for i in (1, 2)] == [64, 0]


def test_weights_that_are_not_at_hand_are_refused_by_name():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model("llama")[0].config)
    with pytest.raises(
        TargetError, match="model.layers.0.self_attn.q_proj is on disk or on the meta device; load the"
    ):
        rank_profile(empty)
    model, _ = tiny_model("llama")
    cpu_offload(model.model.layers[1])
    with pytest.raises(TargetError, match="model.layers.1.self_attn.q_proj is on disk .* with `exclude_modules`"):
        rank_profile(model)
    assert len(rank_profile(model, exclude_modules=r".*layers\.1.*").rows) == 7


def test_quantized_weights_are_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, _ = tiny_model("llama")
    quantization.quantize_(model.model.layers[1].mlp, quantization.Int8WeightOnlyConfig(version=2))
    with pytest.raises(TargetError, match="model.layers.1.mlp.gate_proj is quantized, .* give the model that it was"):
        rank_profile(model)
    assert len(rank_profile(model, exclude_modules=r".*1\.mlp.*").rows) == 11


def test_refusals():
    model, _ = tiny_model("llama")
    for energy in (0, 1.1, True, "high"):
        with pytest.raises(ConfigError, match=r"`energy`=.* must be in \(0, 1\]"):
            rank_profile(model, energy=energy)
    with pytest.raises(TargetError, match="matches no linear layer"):
        rank_profile(model, target_modules=["qq_proj"])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="The weight of model.layers.0.mlp.up_proj holds 1 NaN"):
        rank_profile(model)
