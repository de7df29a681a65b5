"""Probes of a model tell what its outputs become, and leave it as it was."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    FORMATS,
    METHODS,
    Calibration,
    CalibrationError,
    LowRankConfig,
    NonFiniteError,
    ResourceError,
    collect_statistics,
    factorize,
    summary,
)
from hf_lowrank.allocation import ALLOCATORS
from hf_lowrank.integrations import probe as probe_module
from hf_lowrank.integrations.planning import gather, informed_plan
from hf_lowrank.integrations.probe import Keeping, probing
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import make_weight, tiny_model


NAMES = ["llama", "gpt2", "bert", "t5", "mixtral", "gpt_oss", "vit"]
REST = {".*": "dense"}
SVD = LowRankConfig(method="svd", allocation="lems")


def batches_for(inputs, count=3):
    return [inputs() for _ in range(count)]


def sharpened(name):
    """A model whose outputs are far from uniform, so that divergences are well above rounding."""
    model, inputs = tiny_model(name)
    with torch.no_grad():
        for site in match_sites(model):
            model.get_parameter(site.weight_name).mul_(4)
    return model, inputs


def sites_of(model):
    return {site.name: site for site in match_sites(model)}


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_that_of_the_factorized_model(name):
    """Against `factorize` and a plain softmax, written out here."""
    model, inputs = sharpened(name)
    batches = batches_for(inputs)
    sites = sites_of(model)
    chosen = dict.fromkeys(list(sites)[:3], 8)
    with probing(model, sites, SVD, None, batches) as probe:
        found = probe.divergence(chosen)
    with torch.no_grad():
        dense = model(**inputs()).logits.double().log_softmax(-1)
        config = LowRankConfig(method="svd", rank_pattern={f"{key}$": rank for key, rank in chosen.items()} | REST)
        changed = factorize(model, config)(**inputs()).logits.double().log_softmax(-1)
    expected = float((dense.exp() * (dense - changed)).sum(-1).mean())
    assert expected > 1e-5
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_method_that_shifts_biases(name):
    """With and without biases in the dense model."""
    model, inputs = sharpened(name)
    config = LowRankConfig(method="feature_pca", allocation="lems", rank=8, calibration=[inputs()])
    statistics = collect_statistics(model, [inputs()], method="feature_pca")
    with probing(model, sites_of(model), config, statistics, [inputs()]) as probe:
        found = probe.divergence(dict.fromkeys(sites_of(model), 8))
        assert probe.divergence({}) == 0
    with torch.no_grad():
        reference = model(**inputs()).logits.log_softmax(-1)
        logits = factorize(model, config)(**inputs()).logits.log_softmax(-1)
    expected = float((reference.exp() * (reference - logits)).sum(-1).mean())
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_restored_bit_for_bit(name):
    model, inputs = tiny_model(name)
    model.train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    memory = {key: value.data_ptr() for key, value in model.named_parameters()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    sites = sites_of(model)
    with probing(model, sites, SVD, None, batches_for(inputs)) as probe:
        assert not any(module.training for module in model.modules())
        first = probe.divergence(dict.fromkeys(sites, 8))
        check_same(model, before)
        assert probe.divergence({}) == 0
        assert probe.divergence(dict.fromkeys(sites, 8)) == first
    check_same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert {key: value.data_ptr() for key, value in model.named_parameters()} == memory
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags


def check_same(model, before):
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_restored_after_a_failure_too(monkeypatch):
    model, inputs = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = sites_of(model)
    with pytest.raises(ArithmeticError, match="stop"):
        with probing(model, sites, SVD, None, batches_for(inputs)) as probe:
            real = probe_module.site_factors

            def breaks(site, *args):
                if site.name == list(sites)[2]:
                    raise ArithmeticError("stop")
                return real(site, *args)

            monkeypatch.setattr(probe_module, "site_factors", breaks)
            probe.divergence(dict.fromkeys(sites, 8))
    check_same(model, before)
    model.train()
    with pytest.raises(ZeroDivisionError):
        with probing(model, sites, SVD, None, batches_for(inputs)):
            raise ZeroDivisionError
    assert model.training


def test_loss_is_the_models_own():
    model, inputs = tiny_model("llama")
    ids = inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with probing(model, sites_of(model), SVD, None, [{"input_ids": ids, "attention_mask": mask}]) as probe:
        found = probe.loss({})
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    wanted = torch.cat([logits[0, :-1], logits[1, :3]]), torch.cat([ids[0, 1:], ids[1, 1:4]])
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(*wanted)), rel=1e-5)
    model, inputs = tiny_model("bert")
    with probing(model, sites_of(model), SVD, None, [inputs()]) as probe:
        with pytest.raises(CalibrationError, match="needs a loss, and BertForMaskedLM computes none"):
            probe.loss({})
    labelled = {**inputs(), "labels": inputs()["input_ids"]}
    with probing(model, sites_of(model), SVD, None, [labelled]) as probe, torch.no_grad():
        assert probe.loss({}) == pytest.approx(float(model(**labelled).loss), rel=1e-5)


def test_padding_does_not_count():
    model, inputs = sharpened("llama")
    ids = inputs()["input_ids"][:1]
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=ids.dtype)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 9, dtype=ids.dtype)], 1)
    ranks = dict.fromkeys(sites_of(model), 8)
    readings = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        with probing(model, sites_of(model), SVD, None, [batch]) as probe:
            readings.append(probe.divergence(ranks))
    assert readings[0] == pytest.approx(readings[1], rel=1e-4)


def test_kept_outputs_stay_within_the_limit(monkeypatch):
    model, _ = tiny_model("llama")
    batches = [{"input_ids": torch.randint(3, 90, (4, 30))} for _ in range(3)]
    limit = 50 * 96 * 4
    monkeypatch.setattr(probe_module, "KEPT_BYTES", limit)
    with probing(model, sites_of(model), SVD, None, batches) as probe:
        assert 0 < sum(t.numel() * t.element_size() for t in probe._dense) <= limit
        assert all(t.untyped_storage().nbytes() <= limit for t in probe._dense)
        assert probe.divergence(dict.fromkeys(sites_of(model), 8)) > 0


def test_refusals():
    model, inputs = tiny_model("llama")
    sites = sites_of(model)
    with pytest.raises(CalibrationError, match="gave no batch"):
        with probing(model, sites, SVD, None, []):
            pass
    with pytest.raises(CalibrationError, match="predicted distributions, which LlamaModel does not put out"):
        with probing(model.model, sites_of(model.model), SVD, None, [inputs()]):
            pass
    with pytest.raises(ResourceError, match="needs the dense model in memory"):
        with probing(model.to("meta"), sites, SVD, None, [inputs()]):
            pass


def test_overflow_is_an_error():
    model, inputs = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e38)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match="outputs hold NaN or infinite"):
        with probing(model, sites_of(model), SVD, None, [inputs()]) as probe:
            probe.divergence({"model.layers.0.mlp.up_proj": 8})


def test_keeping_takes_whole_batches_and_reads_no_further():
    def stream():
        for size in (2, 3, 4):
            yield {"input_ids": torch.zeros(size, 5)}
        raise AssertionError("read too far")

    keeping = Keeping(stream(), 4)
    keeping.take()
    assert [len(batch["input_ids"]) for batch in keeping.kept] == [2, 3]
    keeping = Keeping([{"input_ids": torch.zeros(2, 5)}] * 4, 3)
    assert (len(keeping), len(list(keeping)), len(keeping.kept)) == (4, 4, 2)


@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
@pytest.mark.parametrize("allocation", ["lems", {"name": "bayes", "n_trials": 4}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_streaming_and_memory_agree(tmp_path, name, allocation, method):
    dense, _ = tiny_model(name)
    dense.save_pretrained(tmp_path)
    batches = [{"input_ids": torch.randint(3, 90, (4, 30), generator=torch.Generator().manual_seed(1))}]
    config = LowRankConfig(method=method, allocation=allocation, param_ratio=0.6, calibration=batches)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)
    memory = factorize(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    assert str(summary(streamed)) == str(summary(memory))
    state = memory.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in streamed.state_dict().items())
    kept = sum(row.parameters for row in summary(streamed).rows)
    factorized = sum(row.dense_parameters for row in summary(streamed).rows)
    targeted = sum(site.copies * site.out_features * site.in_features for site in match_sites(dense))
    assert kept + targeted - factorized <= 0.6 * targeted
    assert len({row.rank for row in summary(streamed).rows}) > 1
    streamed.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.quantization_config.recipe["allocation"] == ALLOCATORS.describe(config.allocation)


@pytest.mark.parametrize("allocation", ["lems", "bayes"])
def test_without_data(tmp_path, allocation):
    model, inputs = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = LowRankConfig(method="svd", allocation=allocation, calibration=None)
    for attempt in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config),
        lambda: factorize(model, config),
    ):
        with pytest.raises(CalibrationError, match=f"`allocation`='{allocation}' .* `calibration` is None"):
            attempt()
    statistics = collect_statistics(model, [inputs()], method="whitened_svd")
    config = LowRankConfig(method="whitened_svd", allocation=allocation, calibration=statistics)
    with pytest.raises(CalibrationError, match=f"`allocation`='{allocation}' .* `calibration` is saved statistics"):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)


def test_self_calibration_feeds_the_probe():
    model, _ = tiny_model("llama")
    calibration = Calibration(samples=6, length=12, batch_size=2)
    config = LowRankConfig(
        method="svd", allocation={"name": "lems", "search_samples": 3}, param_ratio=0.5, calibration=calibration
    )
    gathered = gather(model, match_sites(model), config, config.calibration, None)
    assert gathered.statistics is None
    assert sum(len(batch["input_ids"]) for batch in gathered.batches) == 4
    assert informed_plan(model, config, gathered).ranks


def test_lems_beats_uniform_on_a_model_with_one_layer_that_matters():
    """A layer that nothing reads gets next to nothing."""
    model, inputs = sharpened("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-6)
    config = {"method": "svd", "param_ratio": 0.6, "calibration": batches_for(inputs, 1)}
    with torch.no_grad():
        reference = model(**inputs()).logits.log_softmax(-1)
        divergence = {}
        for allocation in ("uniform", "lems"):
            changed = factorize(copy.deepcopy(model), LowRankConfig(allocation=allocation, **config))
            logits = changed(**inputs()).logits.log_softmax(-1)
            divergence[allocation] = float((reference.exp() * (reference - logits)).sum(-1).mean())
    assert divergence["lems"] < 0.8 * divergence["uniform"]
    ranks = {row.name: row.rank for row in summary(changed).rows}
    assert ranks["model.layers.0.mlp.up_proj"] == 8


@pytest.mark.parametrize("method", ["sparse_low_rank", "dsformer"])
def test_products_are_those_of_the_layer_also_with_more_than_two_factors(method):
    factors = METHODS[method]().factorize(make_weight(24, 32), 6, {})
    for dtype in (torch.float32, torch.bfloat16):
        layer = FORMATS[METHODS[method].format].from_factors(factors, dtype=dtype)
        found = probe_module._product(factors, dtype)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.to(dtype), layer.dense_weight())
