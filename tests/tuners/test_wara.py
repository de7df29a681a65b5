"""What is special to WaRA: its identities, which of its configurations is a LoRA in disguise, and its own errors."""

import copy

import peft
import pytest
import torch
from torch import nn

import hf_lowrank
from hf_lowrank import ConfigError, MixedRankConfig, RankError, TargetError, WaraConfig, factorize
from hf_lowrank.linalg import band_sizes, synthesize, wavelet_filters
from hf_lowrank.testing import tiny_model
from hf_lowrank.tuners.wara import WaraLinear, to_lora


HAAR_SHARED = pytest.mark.filterwarnings("ignore:.*LoRA in disguise")
EXACT = {"rtol": 0, "atol": 1e-12}


def transform(size, levels=1, wavelet="haar"):
    bands = [torch.eye(n, dtype=torch.float64) for n in band_sizes(size, levels).values()]
    return synthesize(bands, wavelet_filters(wavelet), size)


def adapted(out_features, in_features, **options):
    """A float64 layer with one adapter that is not zero, and the tables of its two sides."""
    layer = WaraLinear(nn.Linear(in_features, out_features, dtype=torch.float64))
    config = WaraConfig(**options)
    layer.check("layer", layer.base_layer, config)
    layer.update_layer("default", "layer", config)
    for table in layer.wara_B["default"].values():
        nn.init.normal_(table)
    return layer, dict(layer.wara_B["default"].items()), dict(layer.wara_A["default"].items())


def delta(layer):
    return layer.get_delta_weight("default").detach()


@HAAR_SHARED
@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
@pytest.mark.parametrize("gains", [{}, {"L:L": 2.0, "H1:H1": -0.5}])
def test_shared_is_one_block_for_every_band(wavelet, gains):
    layer, b, a = adapted(16, 10, r=3, lora_alpha=6, wavelet=wavelet, share_subbands=True, subband_gains=gains)
    block = b["shared"].T @ a["shared"]
    blocks = torch.block_diag(gains.get("L:L", 1) * block, gains.get("H1:H1", 1) * block)
    expected = 2 * transform(16, 1, wavelet).T @ blocks @ transform(10, 1, wavelet)
    torch.testing.assert_close(delta(layer), expected, **EXACT)
    assert torch.linalg.matrix_rank(delta(layer)) == 6
    assert sum(table.numel() for table in (*b.values(), *a.values())) == 3 * (16 + 10) // 2


@HAAR_SHARED
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 2.0), (2.0, -0.5)])
def test_of_the_haar_wavelet_a_two_by_two_matrix_is_left(low, high):
    gains = {"L:L": low, "H1:H1": high}
    layer, b, a = adapted(16, 10, r=3, lora_alpha=3, share_subbands=True, subband_gains=gains)
    pair = torch.tensor([[low + high, low - high], [low - high, low + high]], dtype=torch.float64) / 2
    torch.testing.assert_close(delta(layer), torch.kron(b["shared"].T @ a["shared"], pair), **EXACT)


def test_of_longer_wavelets_more_is_left():
    layer, b, a = adapted(16, 10, r=3, lora_alpha=3, share_subbands=True, wavelet="db2")
    kronecker = torch.kron(b["shared"].T @ a["shared"], torch.eye(2, dtype=torch.float64))
    assert (delta(layer) - kronecker).abs().max() > 0.1


@HAAR_SHARED
def test_shared_is_the_adapter_between_two_dimensional_transforms():
    # As in the figure of the first version: transform features and tokens, one adapter for all four bands, back.
    layer, b, a = adapted(16, 10, r=3, lora_alpha=3, wavelet="db2", share_subbands=True)
    x = torch.randn(12, 10, dtype=torch.float64)
    tokens, inputs, outputs = transform(12, 1, "db2"), transform(10, 1, "db2"), transform(16, 1, "db2")
    coefficients = tokens @ x @ inputs.T
    bands = torch.cat([coefficients[:, :5] @ a["shared"].T, coefficients[:, 5:] @ a["shared"].T]).split(12)
    y = tokens.T @ torch.cat([band @ b["shared"] for band in bands], 1) @ outputs
    torch.testing.assert_close(layer(x) - layer.base_layer(x), y, **EXACT)


def test_a_transform_over_tokens_with_one_adapter_is_lora():
    x = torch.randn(12, 10, dtype=torch.float64)
    b, a = torch.randn(16, 3, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    tokens = transform(12, 2, "db2")
    bands = (tokens @ x).split(list(band_sizes(12, 2).values()))
    through = tokens.T @ torch.cat([band @ a.T @ b.T for band in bands])
    torch.testing.assert_close(through, x @ (b @ a).T, **EXACT)
    with pytest.raises(ConfigError, match="`mode`='grid' is not offered.* equivalent to LoRA .* mode='weight'"):
        WaraConfig(mode="grid")


@pytest.mark.parametrize(("rows", "columns", "levels"), [(16, 10, 1), (17, 11, 1), (23, 31, 3)])
@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_every_pair_of_bands_has_its_own_block(rows, columns, levels, wavelet):
    options = {"r": 2, "levels": levels, "wavelet": wavelet, "lora_alpha": 6, "subband_gains": {"L:H1": 3.0}}
    layer, b, a = adapted(rows, columns, **options, subband_ranks={"L:H1": 1, "H1:H1": 0})
    outputs, inputs = band_sizes(rows, levels), band_sizes(columns, levels)
    blocks = (transform(rows, levels, wavelet) @ delta(layer) @ transform(columns, levels, wavelet).T).split(
        list(outputs.values())
    )
    starts_a, starts_b = dict.fromkeys(inputs, 0), dict.fromkeys(outputs, 0)
    total = 0
    for o, block in zip(outputs, blocks, strict=True):
        for i, part in zip(inputs, block.split(list(inputs.values()), 1), strict=True):
            rank = {"L:H1": 1, "H1:H1": 0}.get(f"{o}:{i}", 2)
            left = b[o][starts_b[o] : starts_b[o] + rank] if rank else part.new_zeros(0, len(part))
            right = a[i][starts_a[i] : starts_a[i] + rank] if rank else part.new_zeros(0, part.shape[1])
            gain = 3.0 if (o, i) == ("L", "H1") else 1.0
            torch.testing.assert_close(part, 3 * gain * left.T @ right, **EXACT)
            starts_a[i], starts_b[o], total = starts_a[i] + rank, starts_b[o] + rank, total + rank
    left, right = layer.factors("default")
    assert left.shape == (rows, total)
    assert right.shape == (total, columns)
    torch.testing.assert_close(left @ right, delta(layer), **EXACT)


def test_rank_and_parameters_beside_lora():
    layer, b, a = adapted(48, 40)
    assert torch.linalg.matrix_rank(delta(layer)) == 16, "the sum of the ranks of the four pairs"
    assert sum(table.numel() for table in (*b.values(), *a.values())) == 8 * (48 + 40), "as many as LoRA at r = 8"


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_compiles_without_a_graph_break(wavelet):
    layer, _, _ = adapted(17, 10, wavelet=wavelet, r=2, subband_gains={"L:L": 2.0})
    x = torch.randn(3, 10, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), **EXACT)
    # An optimizer step is seen: nothing of the lifted factors is kept from one call to the next.
    nn.init.ones_(layer.wara_B["default"]["L"])
    torch.testing.assert_close(compiled(x), layer(x), **EXACT)


def test_scale():
    for options, scale in (
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "subband_ranks": {"L:L": 8}}, 1.0),
        ({"rank_pattern": {"layer": 2}, "alpha_pattern": {"lay.*": 3}}, 1.5),
        ({"rank_pattern": {"layer": {"L:L": 8, "L:H1": 0, "H1:L": 0, "H1:H1": 0}}}, 0.5),
    ):
        assert adapted(20, 20, **options)[0].scaling["default"] == scale


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 17}, RankError, r"k_proj: rank 17 of the bands L:L exceeds min\(out, in\) of their 16 x 32 coeff"),
        (
            {"levels": 6, "r": 1, "target_modules": ["k_proj"]},
            ConfigError,
            "k_proj: `levels`=6 is too many for a side of 32: .* use at most 5",
        ),
        ({"target_modules": ["up_proj", "norm"]}, TargetError, "model.norm: `target_modules` names a LlamaRMSNorm"),
    ],
)
def test_refused_before_the_model_is_changed(options, error, message):
    model, _ = tiny_model("llama")
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, WaraConfig(**options))
    assert not any(isinstance(module, WaraLinear) for module in model.modules())


def test_a_second_adapter_by_an_expression_that_fits_the_first_ones_insides_too():
    model = peft.get_peft_model(tiny_model("llama")[0], WaraConfig(target_modules=".*q_proj.*"))
    model.add_adapter("second", WaraConfig(target_modules=".*q_proj.*", r=2))
    layers = [module for module in model.modules() if isinstance(module, WaraLinear)]
    assert [sorted(layer.scaling) for layer in layers] == [["default", "second"]] * 2


def test_nothing_is_kept_once_adapters_are_gone():
    model, _ = tiny_model("llama")
    attributes = set(vars(model.model.layers[0].self_attn.q_proj))
    merged = peft.get_peft_model(model, WaraConfig(target_modules=["q_proj"])).merge_and_unload()
    assert set(vars(merged.model.layers[0].self_attn.q_proj)) == attributes


@pytest.mark.parametrize("format", ["low_rank", "pivoted"])
def test_a_factorized_layer_counts_as_one_and_takes_the_merged_factors(format):
    model, inputs = tiny_model("llama")
    config = hf_lowrank.LowRankConfig(method="svd", target_modules=["down_proj"], rank=4, format=format)
    model = peft.get_peft_model(factorize(model, config), WaraConfig(r=2)).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, WaraLinear)]
    assert len(names) == 14
    assert not any(".base_layer" in name for name in names)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        adapted = model(**inputs()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs()).logits, adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs()).logits, adapted, rtol=1e-4, atol=1e-5)
    layer = merged.model.layers[0].mlp.down_proj
    assert type(layer) is hf_lowrank.FORMATS[format]
    # Four pairs of bands, each of which adds its rank.
    assert layer.rank == 4 + 4 * 2
    assert all(p.requires_grad is False for p in layer.parameters())


def test_a_weight_that_is_computed_or_not_finite_refuses_to_merge():
    layer, _, _ = adapted(8, 6, r=1)
    nn.init.constant_(layer.wara_B["default"]["L"], float("nan"))
    before = layer.base_layer.weight.clone()
    with pytest.raises(hf_lowrank.NonFiniteError, match="would hold NaN or infinite values"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    layer = WaraLinear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)))
    layer.update_layer("default", "layer", WaraConfig(r=1))
    with pytest.raises(TargetError, match="whose weight is computed or quantized"):
        layer.merge()


@pytest.mark.parametrize("bias", ["all", "wara_only"])
@pytest.mark.parametrize("format", [None, "low_rank", "pivoted"])
def test_biases_are_trained_and_saved(bias, format, tmp_path):
    def base():
        model, inputs = tiny_model("qwen2")
        if format is not None:
            factorize(model, hf_lowrank.LowRankConfig(method="svd", format=format, param_ratio=0.5))
        return model, inputs

    model, inputs = base()
    model = peft.get_peft_model(model, WaraConfig(bias=bias, target_modules=["q_proj", "k_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "wara_" not in name]
    assert len(trained) == (6 if bias == "all" else 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    with torch.no_grad():
        expected = model(**inputs()).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base()[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, expected)


def test_to_lora_keeps_everything_else(tmp_path):
    model, inputs = tiny_model("gpt2")
    config = WaraConfig(
        rank_pattern={"c_attn": 2}, bias="all", modules_to_save=["lm_head"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs()).logits
    lora, state = to_lora(model)
    assert (lora.r, lora.bias, lora.lora_dropout, lora.task_type) == (16, "all", 0.1, "CAUSAL_LM")
    assert set(lora.rank_pattern.values()) == {8}
    again = peft.get_peft_model(tiny_model("gpt2")[0], lora).eval()
    missing = peft.set_peft_model_state_dict(again, state)
    assert not missing.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs()).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TargetError, match=r"`adapter_name`='other' is no adapter of hf_lowrank .* it has \['default'"):
        to_lora(model, "other")


def test_to_lora_tells_a_module_from_one_that_ends_like_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.block = nn.ModuleDict({"fc": nn.Linear(16, 16), "other": nn.Linear(16, 16)})

        def forward(self, x):
            return self.block["other"](self.block["fc"](self.fc(x)))

    base = Two()
    pattern = {"^fc": 2, "^block.fc": 3}
    config = WaraConfig(r=4, target_modules=["fc", "block.fc", "other"], rank_pattern=pattern)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    lora, state = to_lora(model)
    again = peft.get_peft_model(copy.deepcopy(base), lora)
    assert not peft.set_peft_model_state_dict(again, state).unexpected_keys
    x = torch.ones(1, 16)
    torch.testing.assert_close(again(x), model(x))


def test_what_saved_adapters_say_stays_known():
    """Files that are out there are found by this very sentence."""
    for name in ("WARA", "MIXED_RANK"):
        sentence = (
            f"{name} is a tuner of hf_lowrank: run `pip install -U 'hf-lowrank[peft]'` and `import hf_lowrank` before "
            "this adapter is loaded"
        )
        assert sentence in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("options", [{}, {"layers_pattern": "layers"}, {"target_modules": ["q_proj", "up_proj"]}])
@pytest.mark.parametrize("config", [WaraConfig, MixedRankConfig])
def test_layers_can_be_chosen(config, options):
    model, _ = tiny_model("llama")
    model = peft.get_peft_model(model, config(layers_to_transform=[1], **options))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "merged_adapters")}
    assert len(adapted) == (2 if "target_modules" in options else 7)
    assert all(".layers.1." in name for name in adapted)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"`layers_to_transform`=\[7\] leaves none of 14 linear layers"):
        peft.get_peft_model(tiny_model("llama")[0], WaraConfig(layers_to_transform=[7]))


def test_beside_another_tuner_each_takes_out_its_own():
    """A restored weight would lose, or keep, what the other has merged."""
    targets, (model, inputs) = ["q_proj", "up_proj"], tiny_model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = {"lora": peft.LoraConfig(target_modules=targets), "wara": WaraConfig(target_modules=targets)}
    for order in (("lora", "wara"), ("wara", "lora")):
        model, inputs = tiny_model("llama")
        for name in order:
            peft.inject_adapter_in_model(configs[name], model, adapter_name=name)
        layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        assert len(layers) == 8
        for layer in layers:
            layer.set_adapter(["lora", "wara"])
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        for merging in (layers, layers[::-1]):
            for layer in merging:
                layer.merge()
            for layer in layers:
                layer.unmerge()
            found = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
            for name, tensor in dense.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
