"""One pass, counted once, padding never."""

from types import SimpleNamespace

import pytest
import torch

from hf_lowrank import CalibrationError, ResourceError, Statistics, StatisticsError, collect_statistics
from hf_lowrank.statistics._fisher_loss import fisher_backward
from hf_lowrank.statistics.collect import collect
from hf_lowrank.statistics.input_gram import InputGram
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import ARCHITECTURES, tiny_model


def grams(model, batches):
    return collect_statistics(model, batches, method="whitened_svd")


def recorded_inputs(model, batches):
    """Independent of the library: every linear's inputs, concatenated, by plain hooks."""
    found, handles = {}, []
    for site in match_sites(model):
        module = model.get_submodule(site.name)

        def keep(_, args, name=site.name):
            found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

        handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def traces(model):
    """Whatever a careless pass could leave behind."""
    return [
        (type(m), list(m._forward_hooks), list(m._forward_pre_hooks), vars(m).get("forward")) for m in model.modules()
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "whisper", "vit", "llava", "phi3"])
def test_gram_of_every_linear(name):
    model, inputs = tiny_model(name)
    statistics = grams(model, [inputs(), inputs()])
    for site, rows in recorded_inputs(model, [inputs(), inputs()]).items():
        gram = statistics.get(site, ["input_gram"])["input_gram"]
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-5)
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_see_their_routed_tokens(name):
    model, inputs = tiny_model(name)
    batch = inputs()
    statistics = grams(model, [batch])
    sites = [site for site in match_sites(model) if site.copies > 1]
    assert len(sites) >= 2
    seen = {}
    for site in sites:
        module = model.get_submodule(site.owner)
        if module in seen:
            continue
        seen[module] = site

        def keep(_, args, name=site.owner):
            hidden, index, _ = args
            rows = hidden[:, None].expand(-1, index.shape[1], -1).reshape(-1, hidden.shape[-1]).double()
            gram = statistics.get(f"{name}.gate_up_proj", ["input_gram"])["input_gram"]
            torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-5, atol=1e-6)

        module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(**batch)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_nothing_is_left_on_the_model(name):
    model, inputs = tiny_model(name)
    with torch.no_grad():
        before = model(**inputs()).logits
    state = traces(model)
    model.train()
    grams(model, [inputs()])
    assert model.training
    model.eval()
    assert traces(model) == state
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, before)


def test_hooks_are_gone_after_a_failure():
    model, inputs = tiny_model("mixtral")
    state = traces(model)
    with pytest.raises(CalibrationError, match="not a dict"):
        grams(model, [inputs(), "text"])
    assert traces(model) == state


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "qwen3_moe"])
def test_padding_is_never_counted(name, side):
    model, inputs = tiny_model(name)
    ids = inputs()["input_ids"]
    padded, mask = torch.full((2, 12), 5), torch.zeros(2, 12, dtype=torch.long)
    positions = slice(5, 12) if side == "left" else slice(0, 7)
    padded[:, positions], mask[:, positions] = ids, 1
    plain = grams(model, [{"input_ids": ids}])
    batch = {"input_ids": padded, "attention_mask": mask}
    if side == "left":
        # Rotary positions are relative, learned ones are not.
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    masked = grams(model, [batch])
    assert masked.provenance["tokens"] == plain.provenance["tokens"] == 14
    for site in match_sites(model):
        expected = plain.get(site.name, ["input_gram"])["input_gram"]
        torch.testing.assert_close(masked.get(site.name, ["input_gram"])["input_gram"], expected, rtol=1e-4, atol=1e-5)


def test_padding_of_both_sides_of_an_encoder_decoder():
    # The same length on both sides, where shapes alone cannot tell the masks apart.
    model, _ = tiny_model("t5")
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    plain = grams(model, [{"input_ids": ids[:, :4], "decoder_input_ids": ids[:, :3]}])
    encoder_mask, decoder_mask = torch.zeros(2, 6).long(), torch.zeros(2, 6).long()
    encoder_mask[:, :4] = decoder_mask[:, :3] = 1
    masked = grams(
        model,
        [
            {
                "input_ids": ids,
                "attention_mask": encoder_mask,
                "decoder_input_ids": ids,
                "decoder_attention_mask": decoder_mask,
            }
        ],
    )
    for site in match_sites(model):
        torch.testing.assert_close(
            masked.get(site.name, ["input_gram"])["input_gram"],
            plain.get(site.name, ["input_gram"])["input_gram"],
            rtol=1e-4,
            atol=1e-5,
        )


def test_linears_with_one_input_share_one_gram():
    model, inputs = tiny_model("llama")
    leaders = grams(model, [inputs()]).leaders
    layer = "model.layers.0"
    assert len({leaders[f"{layer}.self_attn.{x}_proj"] for x in "qkv"}) == 1
    assert leaders[f"{layer}.mlp.gate_proj"] == leaders[f"{layer}.mlp.up_proj"]
    assert len(set(leaders.values())) == 2 * 4
    model, inputs = tiny_model("t5")
    leaders = grams(model, [inputs()]).leaders
    cross = {leaders[f"decoder.block.{i}.layer.1.EncDecAttention.{x}"] for i in range(2) for x in "kv"}
    assert len(cross) == 1, "all layers read the same encoder output"


def test_a_path_that_changes_is_noticed():
    class Fickle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x, same):
            self.a(x)
            return self.b(x if same else x + 1)

    model = Fickle()
    sites = match_sites(model)
    x = torch.randn(3, 4)
    with pytest.raises(StatisticsError, match="b read the same input as a at first, but not every time"):
        collect(model, sites, ["input_gram"], [{"x": x, "same": True}, {"x": x, "same": False}])


def test_layers_without_input_are_named():
    model, _ = tiny_model("llava")
    batch = {"input_ids": torch.arange(3, 10)[None]}
    with pytest.raises(CalibrationError, match="saw no input during calibration, such as model.multi_modal_projector"):
        grams(model, [batch])


def test_no_batches():
    model, _ = tiny_model("llama")
    with pytest.raises(CalibrationError, match="gave no batch"):
        grams(model, iter(()))


def test_blocks_and_strips_do_not_change_the_sum():
    rows = torch.randn(5000, 300)
    whole = InputGram(300, rows.device)
    whole.update(rows)
    parts = InputGram(300, rows.device)
    for part in rows.split(700):
        parts.update(part)
    exact = rows.double().T @ rows.double()
    for statistic in (whole, parts):
        torch.testing.assert_close(statistic.result(), exact, rtol=1e-5, atol=1e-4)


def test_save_and_load(tmp_path):
    model, inputs = tiny_model("llama")
    statistics = grams(model, [inputs()])
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.leaders == statistics.leaders
    assert loaded.provenance == statistics.provenance
    for site in match_sites(model):
        a, b = (s.get(site.name, ["input_gram"])["input_gram"] for s in (statistics, loaded))
        assert torch.equal(a, b)
    loaded.save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").stat().st_size == (tmp_path / "s.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]


def test_not_a_statistics_file(tmp_path):
    model, _ = tiny_model("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(StatisticsError, match="is not a statistics file of version 1"):
        Statistics.load(tmp_path / "model.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(StatisticsError, match="Cannot read statistics"):
        Statistics.load(tmp_path / "empty.safetensors")
    with pytest.raises(StatisticsError, match="Cannot read statistics"):
        Statistics.load(tmp_path / "absent.safetensors")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    model, inputs = tiny_model("llama")
    statistics = grams(model, [inputs()])
    (tmp_path / "s.safetensors").mkdir()
    with pytest.raises(OSError, match="s.safetensors"):
        statistics.save(tmp_path / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_too_little_memory_is_said_before_it_is_used(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 8 * 64 * 64))
    model, inputs = tiny_model("llama")
    with pytest.raises(ResourceError, match="The first 4 statistics need"):
        grams(model, [inputs()])


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_gradient_gram_is_the_fisher_of_sampled_labels(name):
    model, inputs = tiny_model(name)
    statistics = collect_statistics(model, [inputs()], method="kfac_svd", seed=4)
    outputs, handles = {}, []
    for site in match_sites(model):

        def keep(_, __, output, name=site.name):
            output.retain_grad()
            outputs[name] = output

        handles.append(model.get_submodule(site.name).register_forward_hook(keep))
    logits = model(**inputs()).logits.flatten(0, -2)
    cumulated = logits.detach().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(4))
    labels = (cumulated <= (uniform * cumulated[:, -1])[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for site in match_sites(model):
        rows = outputs[site.name].grad.reshape(-1, site.out_features).double()
        norms = rows.norm(dim=1, keepdim=True)
        mean = norms[norms > 0].mean()
        rows = torch.where(norms > 1e-3 * mean, rows * norms.clamp(0.1 * mean, 10 * mean) / norms, rows)
        gram = statistics.get(site.name, ["gradient_gram"])["gradient_gram"]
        expected = rows.T @ rows / len(rows)
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-6 * float(gram.abs().max()) + 1e-12)


def test_gradients_leave_the_model_as_it_was():
    model, inputs = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    collect_statistics(model, [inputs()], method="kfac_svd")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_gradients_reach_every_architecture(name):
    model, inputs = tiny_model(name)
    statistics = collect_statistics(model, [inputs()], method="kfac_svd")
    for site in match_sites(model):
        gram = statistics.get(site.name, ["gradient_gram"])["gradient_gram"]
        assert gram.shape == (site.out_features, site.out_features)
        # Llava reads the last but one vision layer: the last one does not matter to the loss.
        assert (gram.diagonal().sum() > 0) == (not site.name.startswith("model.vision_tower.encoder.layers.1."))


def test_sampled_labels_follow_the_predictions():
    logits = torch.tensor([0.7, 0.2, 0.1, 1e-30]).log().expand(20000, 4).clone().requires_grad_()
    fisher_backward({"logits": logits}, lambda _: None, torch.Generator().manual_seed(0))
    labels = (logits.grad < 0).nonzero()[:, 1]
    share = torch.bincount(labels, minlength=4) / len(logits)
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1, 0.0]), rtol=0, atol=0.01)


def test_several_labels_at_once_are_drawn_one_by_one():
    logits = torch.tensor([2.0, 0.0, -1.0]).expand(20000, 3).clone().requires_grad_()
    fisher_backward({"logits": logits}, lambda _: None, torch.Generator().manual_seed(0), "multi_label_classification")
    p = logits[0].detach().sigmoid()
    torch.testing.assert_close(logits.grad.square().mean(0), p * (1 - p), rtol=0.05, atol=0)


def test_classes_of_places_in_an_image_are_in_front_of_them():
    logits = torch.randn(50, 3, 20, 10, requires_grad=True)
    fisher_backward({"logits": logits}, lambda _: None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(50, 20, 10), rtol=0, atol=1e-5)
    assert ((logits.grad < 0).sum(1) == 1).all()


def test_gradients_of_masked_tokens_are_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    fisher_backward({"logits": logits}, lambda _: mask, torch.Generator().manual_seed(0))
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_padding_has_no_gradient_in_a_model_without_predictions():
    """Encoder and decoder outputs alike: what is masked is as if it were not there."""
    from transformers import AutoModel

    for name in ("bert", "t5"):
        model = AutoModel.from_config(tiny_model(name)[0].config).eval()
        ids = torch.randint(3, 90, (64, 6), generator=torch.Generator().manual_seed(0))
        traces = []
        for padding in (0, 30):
            padded = torch.nn.functional.pad(ids, (0, padding))
            batch = {"input_ids": padded, "attention_mask": (padded > 0).long()}
            if name == "t5":
                batch["decoder_input_ids"], batch["decoder_attention_mask"] = padded, batch["attention_mask"]
            found = collect_statistics(model, [batch] * 4, method="kfac_svd")
            grams = (found.get(site, ["gradient_gram"])["gradient_gram"] for site in found.leaders)
            traces.append(torch.stack([gram.trace() for gram in grams]))
        # Of random labels, drawn anew: equal but for their noise.
        torch.testing.assert_close(traces[1], traces[0], rtol=0.35, atol=1e-9)
