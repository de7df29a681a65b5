"""Zero-sum selection: what is dropped, in which order, and what it predicts."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_lowrank import (
    ALLOCATORS,
    METHODS,
    ConfigError,
    LowRankConfig,
    calibrate_checkpoint,
    collect_statistics,
    factorize,
    summary,
)
from hf_lowrank.allocation import cost_of
from hf_lowrank.integrations.calibration import Labelled
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model
from hf_lowrank.testing.allocators import make_candidates


def with_drops(candidate, drops):
    """A candidate whose rank r drops to r - 1 at `drops[r - 1]`."""
    curve = [sum(drops[r:]) for r in range(len(drops) + 1)]
    return replace(candidate, total=curve[0], curve=curve[1:])


def ranks_at(candidates, budget, **options):
    return ALLOCATORS["sensitivity"](**options).allocate(candidates, budget)


def test_rises_and_falls_take_turns():
    """Two weights of 6 x 6 whose factors are smaller from rank 2 on: four drops each before anything is saved."""
    rising, falling = make_candidates([(6, 6)] * 2)
    candidates = [with_drops(rising, [9.0, 2.0, 1.0, 1.0, 1.0, 1.0]), with_drops(falling, [-9.0, -5, -1, -1, -1, -1])]
    # At zero a rise, above it a fall: 4 of each, and then the next rise, 2, which reaches rank 1 of the first weight.
    assert ranks_at(candidates, 2 * 24) == {"layer.0": 2, "layer.1": 2}
    assert ranks_at(candidates, 24 + 12) == {"layer.0": 1, "layer.1": 2}
    # From 2 on, the fall of 5 is the only one.
    assert ranks_at(candidates, 12 + 12) == {"layer.0": 1, "layer.1": 1}


def test_smallest_first_where_all_have_one_sign():
    candidates = [
        with_drops(c, [d] * 12) for c, d in zip(make_candidates([(12, 12)] * 3), (3.0, 1.0, 2.0), strict=True)
    ]
    ranks = ranks_at(candidates, 2 * 144 + 5 * 24)
    assert ranks == {"layer.0": None, "layer.1": 5, "layer.2": None}
    ranks = ranks_at(candidates, 144 + 24 + 5 * 24)
    assert ranks == {"layer.0": None, "layer.1": 1, "layer.2": 5}


def test_the_sum_of_what_is_dropped_stays_near_zero():
    generator = torch.Generator().manual_seed(0)
    drops = 0.9 ** torch.arange(64) * torch.randn(6, 64, generator=generator)
    layers = make_candidates([(64, 64)] * 6)
    candidates = [with_drops(c, own.tolist()) for c, own in zip(layers, drops, strict=True)]
    largest = max(abs(a - b) for c in candidates for a, b in zip([c.total, *c.curve], c.curve, strict=False))
    for ratio in (0.9, 0.7, 0.5):
        ranks = ranks_at(candidates, ratio * 6 * 64 * 64)
        total = sum(c.curve[ranks[c.name] - 1] for c in candidates if ranks[c.name] is not None)
        assert abs(total) <= 2 * largest
    sizes = [with_drops(c, own.abs().tolist()) for c, own in zip(layers, drops, strict=True)]
    assert ranks_at(sizes, 0.7 * 6 * 64 * 64) != ranks_at(candidates, 0.7 * 6 * 64 * 64), "signs matter"


def test_a_part_of_the_break_even_rank_is_kept():
    candidates = [with_drops(c, [d] * 12) for c, d in zip(make_candidates([(12, 12)] * 2), (1.0, 3.0), strict=True)]
    assert ranks_at(candidates, 144 + 48)["layer.0"] == 2
    # Break-even is 6.
    ranks = ranks_at(candidates, 144 + 48, least=0.5)
    assert ranks["layer.0"] >= 3
    assert cost_of(candidates, ranks) <= 144 + 48
    # Where the budget is out of reach, everything is at its least.
    assert set(ranks_at(candidates, 10, least=0.5).values()) == {3}


def text_of(inputs, model):
    return [*Labelled(model, [inputs()])]


@pytest.mark.parametrize("method", ["whitened_svd", "svd", "asvd"])
def test_the_prediction_is_the_slope_of_the_loss(method):
    """On the line from W to W_r the loss starts with the slope that the curve has at r."""
    model, inputs = tiny_model("llama")
    model = model.double().eval()
    # Of an untrained model little depends on a weight, and its norms round to float32.
    model.lm_head.weight.data *= 30
    batches = text_of(inputs, model)
    statistics = collect_statistics(model, batches, method=method, allocation="sensitivity")
    labels = batches[0]["labels"]

    @torch.no_grad()
    def loss():
        # That of transformers is in float32; as there, the mean over the predicted tokens stands for all.
        predictions = model(**batches[0]).logits[:, :-1].flatten(0, 1)
        return labels.numel() * float(torch.nn.functional.cross_entropy(predictions, labels[:, 1:].flatten()))

    step = 1e-3
    for site in match_sites(model)[:9:2]:
        built, weight = METHODS.build(method), model.get_parameter(site.weight_name)
        stats = statistics.get(site.name, [*built.statistics, "weight_gradient"])
        curve, start = built.loss_curve(weight.detach(), stats), weight.data.clone()
        for rank in (1, 8):
            change, ends = built.factorize(start, rank, stats).product() - start, []
            for side in (step, -step):
                weight.data = start + side * change
                ends.append(loss())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(curve[rank]), rel=2e-2, abs=5e-3)
        weight.data = start


def test_in_memory_and_from_statistics_it_is_one_plan(tmp_path):
    model, inputs = tiny_model("llama")
    config = LowRankConfig("whitened_svd", 0.8, allocation="sensitivity", rank_multiple=1)
    batches = [inputs()]
    own = factorize(copy.deepcopy(model), config, calibration=batches)
    ranks = {row.name: row.rank for row in summary(own).rows}
    file = str(tmp_path / "statistics.safetensors")
    collect_statistics(model, batches, method="whitened_svd", allocation="sensitivity").save(file)
    again = factorize(copy.deepcopy(model), config, calibration=file)
    assert {row.name: row.rank for row in summary(again).rows} == ranks
    model.save_pretrained(tmp_path / "dense")
    config.calibration = batches
    calibrate_checkpoint(tmp_path / "dense", file, config)
    again = factorize(copy.deepcopy(model), config, calibration=file)
    assert {row.name: row.rank for row in summary(again).rows} == ranks
    loaded = type(model).from_pretrained(
        tmp_path / "dense",
        lowrank_config=LowRankConfig(
            "whitened_svd", 0.8, allocation="sensitivity", rank_multiple=1, calibration=batches
        ),
    )
    assert {row.name: row.rank for row in summary(loaded).rows} == ranks
    assert len(set(ranks.values())) > 2
    kept = sum(p.numel() for n, p in own.named_parameters() if "_proj" in n)
    dense = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    assert 0.75 * dense < kept <= 0.8 * dense


def test_weights_that_share_a_basis_have_their_gradients_stacked():
    model, inputs = tiny_model("llama")
    grouped = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q_proj", "k_proj", "v_proj"]]}
    config = LowRankConfig(grouped, 0.6, allocation="sensitivity")
    factorize(model, config, calibration=[inputs()])
    assert any(row.rank for row in summary(model).rows)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("kfac_svd", "second those of labels drawn from the model"),
        ("compot", "known only where the factors at one rank begin"),
        ("snmf", "known only where"),
    ],
)
def test_methods_that_do_not_go_with_it_are_refused(method, match):
    with pytest.raises(ConfigError, match=f"'sensitivity' with `method`='{method}'.*{match}"):
        LowRankConfig(method, allocation="sensitivity")
    LowRankConfig(method, rank=8, allocation="sensitivity")


def test_experts_are_refused():
    model, inputs = tiny_model("mixtral")
    config = LowRankConfig("whitened_svd", 0.6, allocation="sensitivity")
    with pytest.raises(ConfigError, match=r"experts of .* have one statistic together"):
        factorize(model, config, calibration=[inputs()])
