import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPConfig, CLIPModel

from hf_lowrank import (
    ConfigError,
    NonFiniteError,
    RankError,
    SharedBasisHead,
    SharedBasisHeadConfig,
    text_features,
    zero_shot_head,
)


def features(classes=12, size=20, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    if rank is not None:
        made = made[:, :rank] @ torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return made.to(dtype)


def inputs(size=20, count=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_basis_of_the_rank_of_the_features_loses_nothing(normalize):
    wanted = features(rank=4)
    head = SharedBasisHead.from_features(wanted, 4, init="svd", normalize=normalize)
    torch.testing.assert_close(head.class_features(), wanted, rtol=1e-9, atol=1e-9)
    x = inputs()
    expected = x @ wanted.T
    if normalize:
        expected = 100 * nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(wanted, dim=-1).T
    torch.testing.assert_close(head(x), expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in (head.weights, head.basis)) == 4 * (12 + 20)


def test_below_the_rank_svd_is_the_least_error_and_others_are_as_good_as_their_basis_allows():
    wanted = features()
    tail = torch.linalg.svdvals(wanted)[5:].square().sum()
    errors = {}
    for init in ("svd", "pca", "random"):
        head = SharedBasisHead.from_features(wanted, 5, init=init)
        torch.testing.assert_close(head.basis @ head.basis.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        residual = wanted - head.class_features()
        torch.testing.assert_close(residual @ head.basis.T, torch.zeros(12, 5, dtype=torch.float64), rtol=0, atol=1e-9)
        errors[init] = residual.square().sum().item()
    assert errors["svd"] == pytest.approx(tail.item())
    assert errors["svd"] <= errors["pca"] < errors["random"]


def test_a_share_of_the_variance_decides_the_size():
    wanted = features() + 10
    values = torch.linalg.svdvals(wanted - wanted.mean(0)).square()
    size = SharedBasisHead.from_features(wanted, 0.8).config.num_basis
    kept = values.cumsum(0) / values.sum()
    assert kept[size - 1] >= 0.8 > kept[size - 2]
    # Around the origin, the mean is nearly all there is.
    assert SharedBasisHead.from_features(wanted, 0.8, init="svd").config.num_basis == 1


@pytest.mark.parametrize("train, trained", [("weights", "weights"), ("basis", "basis"), ("both", "weights basis")])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_of_the_task_reaches_what_is_trained_and_nothing_else(train, trained, normalize):
    head = SharedBasisHead.from_features(features(), 5, train=train, normalize=normalize)
    nn.functional.cross_entropy(head(inputs()), torch.arange(5)).backward()
    found = {name for name in ("weights", "basis") if getattr(head, name).grad is not None}
    assert found == set(trained.split())


def test_the_auxiliary_loss_is_what_the_equation_says():
    head = SharedBasisHead.from_features(features(), 5, recon_weight=0.1)
    with torch.no_grad():
        head.basis += 0.1 * inputs(20, 5)
    weights, basis, wanted = head.weights.detach(), head.basis.detach(), head.target

    def cosines(rows):
        rows = rows / rows.norm(dim=1, keepdim=True)
        return (rows @ rows.T) * (1 - torch.eye(len(rows), dtype=rows.dtype))

    expected = 0.1 * (weights @ basis - wanted).square().sum() + 0.1 * weights.abs().sum(1).mean()
    between = cosines(basis)
    expected += 0.001 * cosines(weights.T).abs().sum() + 0.001 * (between @ between.T).abs().sum()
    torch.testing.assert_close(head.auxiliary_loss(), expected)
    # The reconstruction alone reaches the basis, and not the weights.
    head.auxiliary_loss().backward()
    fit = (weights @ basis.requires_grad_() - wanted).square().sum()
    apart = (cosines(basis) @ cosines(basis).T).abs().sum()
    (0.1 * fit + 0.001 * apart).backward()
    torch.testing.assert_close(head.basis.grad, basis.grad)


def test_a_new_class_needs_no_training():
    known, new = features(rank=4)[:9], features(rank=4)[9:]
    head = SharedBasisHead.from_features(known, 4, init="svd", bias=torch.zeros(9, dtype=torch.float64))
    before = head(inputs())
    errors = head.add_classes(new, bias=torch.ones(3, dtype=torch.float64))
    assert errors.max() < 1e-9
    logits = head(inputs())
    assert logits.shape == (5, 12)
    torch.testing.assert_close(logits[:, :9], before)
    expected = 100 * nn.functional.normalize(inputs(), dim=-1) @ nn.functional.normalize(new, dim=-1).T + 1
    torch.testing.assert_close(logits[:, 9:], expected, rtol=1e-8, atol=1e-8)
    # One that the basis cannot say is told.
    assert head.add_classes(inputs(20, 1))[0] > 0.5
    head.auxiliary_loss()


def test_adapting_the_weights_keeps_unseen_classes_that_adapting_features_would_lose():
    """Unseen classes follow the seen ones through the basis: the same shift of all inputs is undone for both."""
    torch.manual_seed(0)
    every = nn.functional.normalize(features(30, 16, rank=6), dim=-1)
    seen, unseen = every[:20], every[20:]
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    noise = 0.3 * torch.randn(400, 16, dtype=torch.float64)
    labels = torch.arange(400) % 20
    x = (seen[labels] + noise) @ rotation

    def trained(head, parameters):
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(x), labels).backward()
            optimizer.step()
        return head

    head = SharedBasisHead.from_features(seen, 6, init="svd", train="basis", scale=20.0)
    trained(head, [head.basis])
    codes = unseen @ torch.linalg.pinv(SharedBasisHead.from_features(seen, 6, init="svd").basis.detach())
    tests = (unseen.repeat_interleave(20, 0) + 0.3 * torch.randn(200, 16, dtype=torch.float64)) @ rotation
    right = torch.arange(10).repeat_interleave(20)
    adapted = (nn.functional.normalize(codes @ head.basis.detach(), dim=-1) @ tests.T).argmax(0) == right
    untouched = (unseen @ tests.T).argmax(0) == right
    assert adapted.double().mean() > 0.5 > 0.3 > untouched.double().mean()


@pytest.mark.parametrize("bias", [True, False])
def test_from_a_linear_at_full_size_it_is_that_linear(bias):
    linear = nn.Linear(20, 12, bias=bias)
    head = SharedBasisHead.from_linear(linear, 12)
    x = inputs().float()
    torch.testing.assert_close(head(x), linear(x), rtol=1e-4, atol=1e-5)
    small = SharedBasisHead.from_linear(linear, 3)
    assert sum(t.numel() for t in small.state_dict().values()) == 3 * (20 + 12) + 12 * bias
    with pytest.raises(ConfigError, match="no auxiliary loss"):
        small.auxiliary_loss()
    kept = SharedBasisHead.from_linear(linear, 3, recon_weight=0.1)
    assert torch.equal(kept.target, linear.weight) and kept.auxiliary_loss() > 0


def test_comes_back_from_disk_with_added_classes(tmp_path):
    head = SharedBasisHead.from_features(features(dtype=torch.float32), 5, train="both")
    head.add_classes(features(15, dtype=torch.float32)[12:])
    head.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is SharedBasisHead
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = inputs().float()
    assert torch.equal(again(x), head(x))
    assert torch.equal(again.auxiliary_loss(), head.auxiliary_loss())
    again.forget()
    again.save_pretrained(tmp_path / "small")
    small = AutoModel.from_pretrained(tmp_path / "small")
    assert set(small.state_dict()) == {"weights", "basis", "logit_scale"}
    assert torch.equal(small(x), head(x))
    with pytest.raises(ConfigError, match="no auxiliary loss"):
        small.auxiliary_loss()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_basis": 0}, RankError, r"`num_basis`=0 must be an integer in 1\.\.12"),
        ({"num_basis": 13}, RankError, r"1\.\.12 = min\(classes, d\)"),
        ({"num_basis": 1.0}, RankError, "`num_basis`=1.0"),
        ({"init": "kmeans"}, ConfigError, "`init`='kmeans'"),
        ({"train": "all"}, ConfigError, "`train`='all'"),
        ({"bias": torch.ones(3)}, ConfigError, r"`bias` of .* must be a tensor of 12 numbers.*; got \(3,\)"),
        ({"bias": 1.0}, ConfigError, r"`bias` of .* one for each class; got 1\.0"),
        ({"bias": torch.full((12,), float("nan"))}, NonFiniteError, "`bias`"),
        ({"recon_weight": -1.0}, ConfigError, "`recon_weight`=-1.0"),
        ({"scale": 0.0}, ConfigError, "`scale`=0.0"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SharedBasisHead.from_features(features(), **options)


def test_features_that_are_refused():
    with pytest.raises(NonFiniteError):
        SharedBasisHead.from_features(torch.full((3, 4), float("nan")), 2)
    with pytest.raises(ConfigError, match="floating-point matrix"):
        SharedBasisHead.from_features(torch.ones(3, 4, dtype=torch.long), 2)
    for empty in (torch.zeros(0, 16), torch.zeros(3, 0)):
        with pytest.raises(ConfigError, match=r"`features` of shape \(.*\) .* at least one class and one feature"):
            SharedBasisHead.from_features(empty)
    with pytest.raises(ConfigError, match="`train_factors`='x' of SharedBasisHeadConfig must be one of"):
        SharedBasisHeadConfig(train_factors="x")
    with pytest.raises(ConfigError, match="must be a torch.nn.Linear, not Conv2d"):
        SharedBasisHead.from_linear(nn.Conv2d(3, 4, 1))
    head = SharedBasisHead.from_features(features(), 3)
    with pytest.raises(ConfigError, match=r"must be \(new classes, 20\)"):
        head.add_classes(torch.ones(2, 19))
    with pytest.raises(ConfigError, match="`bias` must have an entry"):
        head.add_classes(torch.ones(2, 20), bias=torch.ones(2))


def tiny_clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def tokenizer(text, return_tensors, padding):
    """As much of a tokenizer as is asked for: characters, an end, padding."""
    rows = [[1, *(3 + ord(c) % 50 for c in sentence.replace("a photo of a ", "")), 2] for sentence in text]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def test_zero_shot_head_of_a_contrastive_model():
    model, labels = tiny_clip(), ["cat", "dog", "house", "tree", "boat"]
    head = zero_shot_head(model, tokenizer, labels, num_basis=5, init="svd")
    pixels = torch.randn(3, 3, 16, 16)
    found = model(**tokenizer([f"a photo of a {each}." for each in labels], "pt", True), pixel_values=pixels)
    image = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(head(image), found.logits_per_image, rtol=1e-4, atol=1e-4)
    assert head.add_classes(text_features(model, tokenizer, ["cat"])) < 1e-4
    torch.testing.assert_close(head(image)[:, -1], head(image)[:, 0], rtol=1e-4, atol=1e-4)
    averaged = text_features(model, tokenizer, labels, ["a photo of a {}.", "{}"])
    torch.testing.assert_close(averaged.norm(dim=1), torch.ones(5))
    with pytest.raises(ConfigError, match="without `get_text_features`"):
        zero_shot_head(nn.Linear(2, 2), tokenizer, labels)
    with pytest.raises(ConfigError, match="needs a place for the name"):
        zero_shot_head(model, tokenizer, labels, template="a photo")
    with pytest.raises(ConfigError, match="`labels`='cat'"):
        zero_shot_head(model, tokenizer, "cat")
