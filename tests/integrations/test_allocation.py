"""Global allocation while loading: one pass measures, the next factorizes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import ConfigError, LowRankConfig, factorize, summary
from hf_lowrank.testing import tiny_model


BATCHES = [{"input_ids": torch.randint(3, 90, (4, 30), generator=torch.Generator().manual_seed(1))}]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["svd", "whitened_svd", "kfac_svd"])
def test_streaming_and_memory_agree_and_keep_the_budget(tmp_path, name, method):
    dense, _ = tiny_model(name)
    dense.save_pretrained(tmp_path)
    config = LowRankConfig(method=method, allocation="knapsack", param_ratio=0.6, calibration=BATCHES)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)
    memory = factorize(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    report = summary(streamed)
    assert str(report) == str(summary(memory))
    state = memory.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in streamed.state_dict().items())
    targeted = sum(site.copies * site.out_features * site.in_features for site in sites(dense))
    kept = targeted - sum(row.dense_parameters - row.parameters for row in report.rows)
    step = sum(row.parameters // row.rank * 8 for row in report.rows)
    assert 0.6 * targeted - step <= kept <= 0.6 * targeted


def sites(model):
    from hf_lowrank.surgery import match_sites

    return match_sites(model)


def test_rank_pattern_wins_and_the_rest_shares_the_budget(tmp_path):
    tiny_model("llama")[0].save_pretrained(tmp_path)
    config = LowRankConfig(
        method="svd",
        allocation="knapsack",
        param_ratio=0.5,
        rank_pattern={"layers.0.mlp.up_proj": 5, "v_proj": "dense"},
    )
    rows = {
        row.name: row.rank
        for row in summary(AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)).rows
    }
    assert rows["model.layers.0.mlp.up_proj"] == 5
    assert not any("v_proj" in name for name in rows)
    assert len(set(rows.values())) > 2


@pytest.mark.parametrize(
    ("allocation", "match"),
    [
        ({"name": "knapsack", "cost": "latency", "latencies": "nope.json"}, "nope.json' is no table of latencies"),
        ({"name": "bayes", "initial": {"query": 0.5}}, r"`initial` of bayes names \['query'\]"),
        ({"name": "lorap", "favoured": ["nothing"], "over": ["q_proj"]}, "`favoured`"),
    ],
)
def test_options_that_do_not_fit_are_told_before_any_pass(allocation, match, tmp_path):
    model, inputs = tiny_model("llama")
    model.save_pretrained(tmp_path)
    passes = []
    batches = [inputs()]
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    config = LowRankConfig(param_ratio=0.6, allocation=allocation, calibration=batches)
    with pytest.raises(ConfigError, match=match):
        factorize(model, config)
    assert not passes
    with pytest.raises(ConfigError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config)
