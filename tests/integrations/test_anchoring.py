"""Factorization against the compressed prefix: better than without, on any architecture, and nothing is lost."""

import copy

import pytest
import torch
from walks import batches_of, last_hidden

from hf_lowrank import CalibrationError, LowRankConfig, NonFiniteError, ResourceError, collect_statistics, factorize
from hf_lowrank.methods.anchored_svd import AnchoredSVD
from hf_lowrank.methods.whitened_svd import WhitenedSVD
from hf_lowrank.surgery import factorized
from hf_lowrank.testing import ARCHITECTURES, tiny_model


# Ridge and shrinkage of the same strength, and budgets alike, so that only the anchoring differs.
RIDGE = 1e-3
ANCHORED = AnchoredSVD(two_sided=False, ridge=RIDGE)
WHITENED = WhitenedSVD(shrinkage=RIDGE / (1 + RIDGE))
OPTIONS = {"param_ratio": 0.5, "rank_multiple": 1, "format": "low_rank"}


def made(name, method, **options):
    model, inputs = tiny_model(name)
    batches = batches_of(inputs, count=4)
    return factorize(model.eval(), LowRankConfig(method=method, **OPTIONS, **options), calibration=batches), batches


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_errors_in_front_are_made_up_for(name):
    dense, _ = tiny_model(name)
    dense.eval()
    anchored, batches = made(name, ANCHORED)
    plain, _ = made(name, WHITENED)
    target, *others = (torch.cat(last_hidden(model, dense, batches)) for model in (dense, anchored, plain))
    errors = [float((other - target).square().sum()) for other in others]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture(name):
    model, batches = made(name, "anchored_svd")
    assert factorized(model)
    with torch.no_grad():
        output = model(**batches[0])
    assert all(torch.isfinite(t).all() for t in output.to_tuple() if isinstance(t, torch.Tensor))


def test_what_reads_the_embeddings_is_not_changed_by_the_anchor():
    # In front of the first linears nothing is compressed yet.
    anchored, _ = made("llama", ANCHORED)
    plain, _ = made("llama", WHITENED)
    first, later = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    one, other = (m.get_submodule(first).weight.materialize() for m in (anchored, plain))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one, other = (m.get_submodule(later).weight.materialize() for m in (anchored, plain))
    assert (one - other).norm() > 1e-3 * other.norm()


def test_same_data_same_bits():
    (one, _), (other, _) = made("llama", "anchored_svd"), made("llama", "anchored_svd")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_padding_does_not_count():
    model, inputs = tiny_model("llama")
    batches = batches_of(inputs)
    padded = []
    for batch in batches:
        ids, length = batch["input_ids"], batch["input_ids"].shape[1]
        ids = torch.cat([ids, torch.full((len(ids), 3), 7)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, length:] = 0
        padded.append({"input_ids": ids, "attention_mask": mask})
    config = LowRankConfig(method=ANCHORED, **OPTIONS)
    whole = [{"input_ids": b["input_ids"], "attention_mask": torch.ones_like(b["input_ids"])} for b in batches]
    one, other = (factorize(copy.deepcopy(model), config, calibration=data) for data in (whole, padded))
    for name in factorized(one):
        a, b = (m.get_submodule(name).weight.materialize() for m in (one, other))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_load_gives_what_factorizing_in_memory_gives(tmp_path):
    model, inputs = tiny_model("llama")
    batches = batches_of(inputs)
    model.save_pretrained(tmp_path)
    config = LowRankConfig(method="anchored_svd", param_ratio=0.5, rank_multiple=2, calibration=batches)
    loaded = type(model).from_pretrained(tmp_path, lowrank_config=config)
    in_memory = factorize(model.eval(), config)
    loaded.save_pretrained(tmp_path / "factorized")
    again = type(model).from_pretrained(tmp_path / "factorized")
    for other in (in_memory, again):
        for a, b in zip(loaded.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_refinement_goes_on_from_anchored_factors():
    model, inputs = tiny_model("llama")
    batches = batches_of(inputs)
    refine = {"name": "blocks", "epochs": 0}
    refined = factorize(copy.deepcopy(model), LowRankConfig(method=ANCHORED, refine=refine, **OPTIONS), batches)
    plain = factorize(model, LowRankConfig(method=ANCHORED, **OPTIONS), batches)
    for a, b in zip(refined.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_saved_statistics_do_not_do(tmp_path):
    model, inputs = tiny_model("llama")
    path = tmp_path / "statistics.safetensors"
    collect_statistics(model, batches_of(inputs), method="anchored_svd").save(path)
    with pytest.raises(CalibrationError, match="'anchored_svd' compares .* saved statistics; give the data"):
        factorize(model, LowRankConfig(method="anchored_svd", calibration=str(path)))
    assert not factorized(model)


def test_a_model_that_is_split_over_processes_is_refused():
    model, inputs = tiny_model("llama")
    model._device_mesh = object()
    config = LowRankConfig(method=ANCHORED, **OPTIONS)
    with pytest.raises(ResourceError, match="anchored methods .* split over processes; factorize on one device"):
        factorize(model, config, calibration=batches_of(inputs))
    assert not factorized(model)


def test_weights_without_an_anchor_are_told(caplog):
    made("mixtral", ANCHORED)
    assert "factorized without an anchor" in caplog.text
    caplog.clear()
    made("llama", ANCHORED)
    assert "without an anchor" not in caplog.text


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, inputs = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def failing(self, weight, rank, stats):
        calls.append(rank)
        if len(calls) == 5:
            raise NonFiniteError("The weight holds NaN.")
        return WHITENED.factorize(weight, rank, {"input_gram": stats["compressed_gram"]})

    monkeypatch.setattr(AnchoredSVD, "factorize", failing)
    model.train()
    with pytest.raises(NonFiniteError, match=r"model\.layers\."):
        factorize(model, LowRankConfig(method=ANCHORED, **OPTIONS), calibration=batches_of(inputs))
    assert not factorized(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
