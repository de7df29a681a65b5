"""Channels taken away: the model computes what it would with these at zero, and comes back from disk as it is."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_lowrank import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DenseLinear,
    LowRankConfig,
    NonFiniteError,
    TargetError,
    collect_statistics,
    factorize,
    model_card,
    prune_channels,
    summary,
    to_dense,
    truncate,
)
from hf_lowrank.passes.prune import Pruning, channel_groups, channel_scores, check_flow, prune_groups
from hf_lowrank.statistics.collect import collect
from hf_lowrank.surgery import factorized
from hf_lowrank.testing import tiny_model


GROUPS = {
    "llama": [[["gate_proj", "up_proj"], "down_proj"]],
    "gpt2": [[["c_fc"], "c_proj"]],
    "bert": [[["intermediate.dense"], "output.dense"]],
}


def made(architecture, dtype=torch.float64):
    model, inputs = tiny_model(architecture)
    # Biases of a new model are zero.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype), inputs()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def zeroed(model, architecture, inputs, pruning):
    """A dense model with the channels at zero that `pruning` takes away."""
    model = copy.deepcopy(model)
    groups = channel_groups(model, GROUPS[architecture])
    statistics = collect(model, [site for group in groups for site in group.sites], ("input_norm",), [inputs])
    for group in groups:
        kept = pruning.kept(channel_scores(model, group, statistics))
        gone = torch.ones(group.consumer.in_features, dtype=torch.bool).index_fill(0, kept, False)
        for site in group.sites:
            layer = model.get_submodule(site.name)
            weight = layer.weight.data.T if site.kind.transposed else layer.weight.data
            if site is group.consumer:
                weight[:, gone] = 0
            else:
                weight[gone] = 0
                if layer.bias is not None:
                    layer.bias.data[gone] = 0
    return model


def test_the_least_important_stay_and_those_above_go():
    """LoRAP: of 1000 channels, with s = 0.2, the 10 least important stay, the next 200 go."""
    scores = torch.rand(1000, dtype=torch.float64)
    rank = scores.argsort().argsort()
    kept = Pruning(0.8).kept(scores)
    assert set(rank[kept].tolist()) == {*range(10), *range(210, 1000)}
    assert torch.equal(kept, kept.sort().values)
    assert set(rank[Pruning(0.8, keep_bottom=0).kept(scores)].tolist()) == set(range(200, 1000))
    assert len(Pruning(0.8123, channel_multiple=8).kept(scores)) == 808
    assert set(rank[Pruning(0.3, keep_bottom=0.2).kept(scores)].tolist()) == {*range(200), *range(900, 1000)}
    assert torch.equal(Pruning(1).kept(scores), torch.arange(1000))


@pytest.mark.parametrize(
    "pruning", [Pruning(0.15, 0.14), Pruning(0.04, 0.03), Pruning(0.01, 0.005), Pruning(0.3, 0.2, 4)], ids=str
)
def test_the_most_important_channel_stays_however_it_is_rounded(pruning):
    for count in (1, 2, 7, 20, 33):
        kept = pruning.kept(torch.arange(float(count)))
        assert count - 1 in kept
        assert len(kept) <= max(1, round(pruning.param_ratio * count))


def test_scores_are_those_of_the_paper():
    model, inputs = made("llama")
    groups = channel_groups(model)
    assert [group.consumer.name for group in groups] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    sites = [site for group in groups for site in group.sites]
    statistics = collect(model, sites, ("input_norm",), [inputs])
    seen = {}
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "down_proj"):
        mlp.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: seen.update({name: x[0].flatten(0, 1)})
        )
    logits(model, inputs)
    x, h = (seen[name].norm(dim=0) for name in ("gate_proj", "down_proj"))
    expected = torch.zeros(96, dtype=torch.float64)
    for c in range(96):
        expected[c] = (mlp.gate_proj.weight[c].abs() * x).norm() + (mlp.up_proj.weight[c].abs() * x).norm()
        expected[c] += (mlp.down_proj.weight[:, c].abs() * h[c]).norm()
    found = channel_scores(model, groups[1], statistics)
    torch.testing.assert_close(found * len(seen["gate_proj"]) ** 0.5, expected.detach())


@pytest.mark.parametrize("architecture", GROUPS)
def test_it_is_the_model_with_these_channels_at_zero(architecture, tmp_path):
    model, inputs = made(architecture)
    expected = logits(zeroed(model, architecture, inputs, Pruning(0.7, keep_bottom=0.05)), inputs)
    before = logits(model, inputs)
    prune_channels(model, 0.7, [inputs], channel_groups=GROUPS[architecture], keep_bottom=0.05)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(before, expected, atol=1e-4)
    rows = summary(model).rows
    assert {row.format for row in rows} == {"dense"}
    width = {"llama": 96, "gpt2": 256, "bert": 96}[architecture]
    for module in model.modules():
        if isinstance(module, DenseLinear):
            assert round(0.7 * width) in (module.in_features, module.out_features)
            assert width in module.replaced_shape
    model.save_pretrained(tmp_path)
    load = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    again = load.from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-10)
    # Zeros come back in the place of what is gone, and the model is an ordinary one.
    to_dense(again)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-10)
    again.save_pretrained(tmp_path / "dense")
    plain = load.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    assert type(plain) is type(model)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=0, atol=1e-10)


def test_numbers_and_bytes_are_counted():
    model, inputs = made("llama", torch.float32)
    dense = sum(parameter.numel() for parameter in model.parameters())
    prune_channels(model, 0.5, [inputs], channel_multiple=32)
    found = summary(model)
    assert {row.shape for row in found.rows} == {"96 x 64", "64 x 96"}
    assert all(row.parameters == 32 * 64 and row.bytes == 4 * 32 * 64 for row in found.rows)
    assert all(row.dense_parameters == 96 * 64 for row in found.rows)
    assert found.dense_parameters == dense
    assert found.parameters == dense - 6 * 64 * 64 == sum(p.numel() for p in model.parameters())


def test_lorap_attention_of_low_rank_and_narrower_feed_forward(tmp_path):
    model, inputs = made("llama", torch.float32)
    inputs = [inputs]
    config = LowRankConfig(
        method="awsvd",
        allocation="lorap",
        param_ratio=0.6,
        rank_multiple=1,
        exclude_modules=["gate_proj", "up_proj", "down_proj"],
        calibration=inputs,
    )
    factorize(model, config)
    prune_channels(model, 0.6, inputs)
    rows = {row.name.removeprefix("model.layers.0."): row for row in summary(model).rows if ".0." in row.name}
    kept = {name: row.parameters / row.dense_parameters for name, row in rows.items()}
    assert kept["mlp.up_proj"] == kept["mlp.down_proj"] == round(0.6 * 96) / 96
    # Grouped-query attention: keys and values have half the rows of queries.
    attention = [row for name, row in rows.items() if name.startswith("self_attn")]
    total = sum(row.dense_parameters for row in attention) + (4 - len(attention)) * 64 * 64
    assert sum(row.parameters for row in attention) + (4 - len(attention)) * 64 * 64 <= 0.6 * total
    assert kept["self_attn.q_proj"] < kept.get("self_attn.v_proj", 1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, inputs[0]), logits(model, inputs[0]), rtol=0, atol=1e-6)
    assert again.config.quantization_config.recipe["method"] == "awsvd"
    assert again.config.quantization_config.recipe["channel_pruning"]["param_ratio"] == 0.6
    card = str(model_card(again))
    assert "channels pruned: in 2 feed-forward layers, `param_ratio` = 0.6, `keep_bottom` = 0.01" in card


def test_a_card_of_nothing_but_pruned_layers():
    model, inputs = made("llama", torch.float32)
    card = str(model_card(prune_channels(model, 0.5, [inputs])))
    assert "channels pruned: in 2 feed-forward layers" in card
    assert "LowRankConfig" not in card


def test_adapters_and_truncation_keep_the_widths(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, inputs = made("llama", torch.float32)
    prune_channels(model, 0.5, [inputs])
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    )
    expected = logits(adapted, inputs)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=1e-5)
    truncate(merged, rank=8, format="low_rank")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {row.format for row in summary(again).rows} == {"low_rank"}
    torch.testing.assert_close(logits(again, inputs), logits(merged, inputs), rtol=0, atol=1e-6)
    assert to_dense(again).model.layers[0].mlp.up_proj.weight.shape == (96, 64)


class Plain(nn.Module):
    """Linears with something between them."""

    def __init__(self, between, width=24):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, width), nn.Linear(width, 8), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    ("between", "fits"),
    [
        (nn.GELU(), True),
        (nn.Identity(), True),
        (nn.LayerNorm(24), False),
        (nn.Softmax(dim=-1), False),
        (nn.Sequential(nn.Unflatten(-1, (4, 6)), nn.ReLU(), nn.Flatten(-2)), True),
        (nn.Sequential(nn.Unflatten(-1, (4, 6)), nn.Softmax(dim=-1), nn.Flatten(-2)), False),
    ],
    ids=["elementwise", "nothing", "norm", "softmax", "view", "heads"],
)
def test_channels_are_pruned_only_where_they_are_read_one_by_one(between, fits):
    model = nn.Sequential(Plain(between)).double()
    inputs = {"input": torch.randn(5, 8, dtype=torch.float64)}
    groups = channel_groups(model, [[["first"], "second"]])
    if fits:
        return check_flow(model, groups, inputs)
    with pytest.raises(TargetError, match="What 0.first put out is not read, channel by channel, by 0.second alone"):
        check_flow(model, groups, inputs)


def test_a_group_that_is_not_one_is_refused_and_the_model_is_as_it_was():
    model, inputs = made("llama")
    before = copy.deepcopy(model.state_dict())
    cases = [
        ([[["wi"], "wo"]], r"`channel_groups`=\[\[\['wi'\], 'wo'\]\] matches no linears of this model, which has 15"),
        ([[["gate_proj"], "down_proj"]], "What .*gate_proj put out is not read, .* by .*down_proj alone"),
        ([[["v_proj"], "o_proj"]], "no channels in common: .*v_proj': 32, .*o_proj': 64"),
        ([[["q_proj"], "o_proj"]], "What .*q_proj put out is not read"),
        ([[["gate_proj", "up"], "down_proj"]], "`channel_groups` needs model.layers.0.mlp.up, which is not there"),
        ([[["gate_proj", "act_fn"], "down_proj"]], "mlp.act_fn, which is no dense linear layer"),
        (GROUPS["llama"] * 2, "puts .* into two groups"),
    ]
    for groups, match in cases:
        with pytest.raises(TargetError, match=match):
            prune_channels(model, 0.5, [inputs], channel_groups=groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    heads, inputs = made("bert")
    with pytest.raises(TargetError, match="is not read, channel by channel"):
        prune_channels(heads, 0.5, [inputs], channel_groups=[[["self.value"], "output.dense"]])


def test_what_is_factorized_or_pruned_already_is_refused():
    model, inputs = made("llama", torch.float32)
    prune_channels(model, 0.5, [inputs])
    with pytest.raises(TargetError, match=r"needs model.layers.0.mlp.gate_proj, which is no dense linear layer"):
        prune_channels(model, 0.5, [inputs])
    with pytest.raises(ConfigError, match="factorized already"):
        factorize(model, LowRankConfig(method="svd"))
    model, _ = made("llama", torch.float32)
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5))
    with pytest.raises(TargetError, match="factorize other layers only, with `exclude_modules`"):
        prune_channels(model, 0.5, [inputs])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"param_ratio": 0}, ConfigError, r"`param_ratio`=0 must be in \(0, 1\]"),
        ({"param_ratio": True}, ConfigError, "`param_ratio`=True"),
        ({"keep_bottom": 1.0}, ConfigError, r"`keep_bottom`=1.0 must be a number in \[0, 1\)"),
        (
            {"param_ratio": 0.1, "keep_bottom": 0.2},
            ConfigError,
            "`keep_bottom`=0.2 must be below `param_ratio`=0.1: of the channels that are kept, none but the least",
        ),
        ({"param_ratio": 0.2, "keep_bottom": 0.2}, ConfigError, "`keep_bottom`=0.2 must be below"),
        ({"channel_multiple": 0}, ConfigError, "`channel_multiple`=0 must be an integer of at least 1"),
        ({"seed": -1}, ConfigError, "`seed`=-1"),
        ({"channel_groups": "down_proj"}, ConfigError, "`channel_groups`='down_proj' must be a list of pairs"),
        ({"channel_groups": []}, ConfigError, "must be a list of pairs"),
        ({"channel_groups": [["up_proj", "down_proj"]]}, ConfigError, "must be a list of pairs"),
        ({"channel_groups": [[[], "down_proj"]]}, ConfigError, "must be a list of pairs"),
        ({"calibration": []}, CalibrationError, "empty list"),
        ({"calibration": None}, CalibrationError, "`calibration` is None"),
    ],
)
def test_arguments_are_checked(options, error, match):
    model, inputs = made("llama", torch.float32)
    with pytest.raises(error, match=match):
        prune_channels(model, **{"calibration": [inputs], **options})


def test_statistics_and_weights_that_cannot_serve():
    model, inputs = made("llama", torch.float32)
    statistics = collect_statistics(model, [inputs], method="awsvd")
    with pytest.raises(CalibrationError, match="`calibration` of prune_channels is statistics; give the data itself"):
        prune_channels(model, 0.5, statistics)
    groups = channel_groups(model)
    statistics = collect(model, [s for g in groups for s in g.sites], ("input_norm",), [inputs])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="The weight of model.layers.0.mlp.up_proj holds NaN"):
        channel_scores(model, groups[0], statistics)
    with pytest.raises(NonFiniteError, match="The weight of model.layers.0.mlp.up_proj holds NaN"):
        prune_groups(model, groups, statistics, Pruning(0.5))
    with pytest.raises(NonFiniteError, match="up_proj holds NaN .* leave it out of `channel_groups`"):
        prune_channels(model, 0.5, [inputs])
    model, inputs = made("llama", torch.float32)
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model.layers.1 puts out NaN on the calibration data"):
        prune_channels(model, 0.5, [inputs])
    assert not factorized(model)


@pytest.mark.parametrize(("entry", "value"), [("out_features", 97), ("out_features", 0), ("in_features", "64")])
def test_damaged_widths_are_refused(entry, value, tmp_path):
    model, inputs = made("llama", torch.float32)
    prune_channels(model, 0.5, [inputs]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.quantization_config.modules["model.layers.0.mlp.up_proj"][entry] = value
    path.write_text(config.to_json_string())
    with pytest.raises(CheckpointError, match=f"`{entry}`={value!r} of model.layers.0.mlp.up_proj must be"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
