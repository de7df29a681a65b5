import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankConv, LowRankLinear, RankError, factorize, summary, to_dense
from hf_lowrank.convolutions import patches


SIZES = {nn.Conv1d: (11,), nn.Conv2d: (9, 11), nn.Conv3d: (5, 6, 7)}
KERNELS = {nn.Conv1d: (3,), nn.Conv2d: (3, 4), nn.Conv3d: (2, 3, 2)}
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
    {"padding": "same", "padding_mode": "replicate"},
    {"padding": "valid", "dilation": 2},
]


def svd(**options):
    return LowRankConfig(method="svd", rank_multiple=1, target_modules="all-layers", **options)


def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3)
    return ConvNextForImageClassification(config).eval()


@pytest.mark.parametrize("cls, options", list(itertools.product(SIZES, GEOMETRIES)))
def test_two_steps_are_the_convolution_with_the_product_whatever_its_geometry(cls, options):
    torch.manual_seed(0)
    dense = cls(6, 8, KERNELS[cls], dtype=torch.float64, **options)
    images = torch.randn(2, 6, *SIZES[cls], dtype=torch.float64)
    layer = factorize(copy.deepcopy(dense), svd(rank_pattern={"root": 3}))
    assert isinstance(layer, LowRankConv)
    assert layer.rank == 3
    for name in set(dense.__constants__) - {"output_padding"}:
        assert getattr(layer, name) == getattr(dense, name), "what the code of models may read"
    kernel = layer.dense_weight()
    assert kernel.shape == dense.weight.shape == layer.weight.shape
    again = to_dense(layer)
    assert type(again) is cls
    torch.testing.assert_close(layer(images), again(images), rtol=1e-12, atol=1e-12)
    # The best of that rank, group by group.
    for whole, part in zip(dense.weight.chunk(dense.groups), kernel.chunk(dense.groups), strict=True):
        tail = torch.linalg.svdvals(whole.flatten(1))[3:].square().sum()
        torch.testing.assert_close((whole - part).square().sum(), tail, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.bias, dense.bias)
    # At full rank nothing is lost.
    full = min(8 // dense.groups, dense.weight[0].numel())
    exact = factorize(copy.deepcopy(dense), svd(rank_pattern={"root": full}))
    torch.testing.assert_close(exact(images), dense(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact(images[0]), dense(images[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls, options", list(itertools.product(SIZES, [o for o in GEOMETRIES if "groups" not in o])))
def test_patches_times_the_kernel_are_the_convolution(cls, options):
    conv = cls(6, 8, KERNELS[cls], dtype=torch.float64, **options)
    images = torch.randn(2, 6, *SIZES[cls], dtype=torch.float64)
    rows = patches(conv, images) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(rows.movedim(-1, 1), conv(images), rtol=1e-12, atol=1e-12)


def test_statistics_are_those_of_the_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, stride=2))
    images = torch.randn(16, 4, 8, 8) * torch.tensor([9.0, 1, 1, 0.1])[:, None, None]
    found = {}
    for method in ("svd", "whitened_svd", "asvd"):
        small = copy.deepcopy(model)
        config = LowRankConfig(method=method, rank=4, rank_multiple=1, target_modules="all-layers")
        factorize(small, config, calibration=[{"input": images}])
        assert [type(layer) for layer in small[::2]] == [LowRankConv] * 2
        found[method] = (small[0](images) - model[0](images)).square().sum()
    assert found["whitened_svd"] < found["svd"]
    # The least output error there is, by a decomposition of the outputs themselves.
    rows = model[0](images).movedim(1, -1).flatten(0, 2) - model[0].bias
    best = torch.linalg.svdvals(rows.double())[4:].square().sum()
    torch.testing.assert_close(found["whitened_svd"].double(), best, rtol=1e-3, atol=0)


def test_gradients_reach_statistics_of_convolutions():
    torch.manual_seed(0)
    model = convnext()
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)}]
    before = model(**images[0]).logits
    config = LowRankConfig(method="kfac_svd", param_ratio=0.9, rank_multiple=1, target_modules=".*downsampling.*")
    factorize(model, config, calibration=images)
    (row,) = summary(model).rows
    assert row.name.endswith("downsampling_layer.1")
    assert 0 < (model(**images[0]).logits - before).abs().max() < 1


def test_what_convolutions_cannot_do_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 16, 3))
    batches = [{"input": torch.randn(2, 8, 9, 9)}]
    for config, message in (
        ({"method": "whitened_svd"}, "0 is a convolution of 2 groups"),
        ({"method": "anchored_svd"}, "compares the inputs of linear layers, and 0 is a convolution"),
        ({"method": "svd", "format": "pivoted"}, "`format`='pivoted' cannot hold 0"),
        ({"method": "dsformer"}, "makes layers of format 'dense_sparse', and 0 can be stored as"),
        ({"method": "feature_pca", "target_modules": ["2"]}, "changes biases, and 2 has no place for them"),
        ({"method": "svd", "refine": "blocks"}, "trains blocks of linear layers"),
    ):
        config = LowRankConfig(**{"rank": 2, "target_modules": "all-layers", **config})
        with pytest.raises(hf_lowrank.ConfigError, match=message):
            factorize(model, config, calibration=batches)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    with pytest.raises(RankError, match=r"rank=9 for root must be an integer in 1\.\.8"):
        factorize(nn.Conv2d(8, 8, 3), svd(rank_pattern={"root": 9}))


def test_all_linear_leaves_convolutions_alone():
    model = convnext()
    factorize(model, LowRankConfig(method="svd", param_ratio=0.5, rank_multiple=1))
    assert {type(m) for m in model.modules() if isinstance(m, (LowRankConv, LowRankLinear))} == {LowRankLinear}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vision_model_comes_back_bit_for_bit(tmp_path, dtype):
    model = convnext().to(dtype)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    factorize(model, svd(param_ratio=0.5))
    rows = {row.name: row for row in summary(model).rows}
    kinds = {type(model.get_submodule(name)) for name in rows}
    assert kinds == {LowRankConv, LowRankLinear}
    # Each channel by itself: rank 1 is the whole, and saves nothing.
    assert not any("dwconv" in name for name in rows)
    for name, row in rows.items():
        layer = model.get_submodule(name)
        stored = sum(t.numel() * t.element_size() for key, t in layer.state_dict().items() if "bias" not in key)
        assert row.bytes == stored
    logits = model(images).logits
    model.save_pretrained(tmp_path / "small")
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.to(dtype)(images).logits, logits)
    streamed = AutoModelForImageClassification.from_pretrained(
        tmp_path / "dense", lowrank_config=svd(param_ratio=0.5), dtype=dtype
    )
    assert torch.equal(streamed(images).logits, logits)
    dense = to_dense(again)
    dense.save_pretrained(tmp_path / "again")
    plain = ConvNextForImageClassification.from_pretrained(tmp_path / "again", dtype=dtype)
    assert not hasattr(plain, "hf_quantizer") or plain.hf_quantizer is None
    torch.testing.assert_close(plain(images).logits, logits, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def test_a_model_that_reads_the_geometry_of_its_convolutions():
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=3)).eval()
    images = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        full = {name: min(m.out_channels // m.groups, m.weight[0].numel()) for name, m in convolutions.items()}
        factorize(model, svd(rank_pattern=full))
        assert all(isinstance(model.get_submodule(name), LowRankConv) for name in full)
        torch.testing.assert_close(model(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)


def test_training_moves_both_factors_and_the_weight_is_read_only():
    layer = factorize(nn.Conv2d(6, 8, 3), svd(rank_pattern={"root": 3}))
    layer(torch.randn(2, 6, 7, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    with pytest.raises(hf_lowrank.ComputedWeightError):
        layer.weight.data.mul_(2)
