"""SmolLM2-135M: 210 matrices, grouped-query attention, tied embeddings."""

import pytest
import torch
from benchmarks.metrics import perplexity
from transformers import AutoModelForCausalLM

from hf_lowrank import Calibration, LowRankConfig, Statistics, factorize, summary
from hf_lowrank.surgery import match_sites


pytestmark = pytest.mark.real
WINDOWS = 6


@pytest.fixture(scope="module")
def statistics(smollm2, data, tmp_path_factory):
    """Input Grams over 24 x 512 tokens of Wikipedia."""
    from hf_lowrank import collect_statistics

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    calibration = Calibration(str(data / "calib_wikipedia" / "train.jsonl"), samples=24, length=512)
    path = tmp_path_factory.mktemp("statistics") / "wikipedia.safetensors"
    collect_statistics(model, calibration, method="whitened_svd").save(path)
    loaded = Statistics.load(path)
    assert loaded.provenance["tokens"] == 24 * 512
    return loaded


def cholesky_whitened(weight, gram, rank):
    """SVD-LLM, version 1, as the paper has it: C = L L^T, svd(W L), truncate, multiply by L^-1.

    Where rounding has made C indefinite, the authors' code shifts it by its lowest eigenvalue; so does this.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        shift = 1e-12 * gram.diagonal().mean() - torch.linalg.eigvalsh(gram)[0]
        lower = torch.linalg.cholesky(gram + 2 * shift * torch.eye(len(gram), dtype=gram.dtype))
    u, s, v = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(lower, v[:rank], upper=False, left=False)


def output_error(difference, gram):
    return ((difference @ gram) * difference).sum().item()


def test_quality_equals_the_textbook(smollm2, statistics, wikitext, two_threads):
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    model = factorize(
        AutoModelForCausalLM.from_pretrained(smollm2),
        LowRankConfig(method="whitened_svd", param_ratio=0.8),
        calibration=statistics,
    )
    ranks = {row.name: row.rank for row in summary(model).rows}
    assert len(ranks) == 210
    ours, theirs = 0.0, 0.0
    for site in match_sites(dense):
        gram = statistics.get(site.name, ["input_gram"])["input_gram"]
        weight = dense.get_submodule(site.name).weight
        textbook = cholesky_whitened(weight.detach(), gram, ranks[site.name])
        layer = model.get_submodule(site.name)
        made = layer.left.weight.detach().double() @ layer.right.weight.detach().double()
        ours += output_error(weight.detach().double() - made, gram)
        theirs += output_error(weight.detach().double() - textbook, gram)
        weight.data = textbook.float()
    # Both are the optimum; ours is stored in float32 factors, which is all that may separate them.
    assert ours <= theirs * (1 + 1e-5)
    measured, reference = (perplexity(m, wikitext, windows=WINDOWS) for m in (model, dense))
    assert abs(measured / reference - 1) < 0.01
    assert reference < 1000, "a sane reference"


def test_streaming_equals_memory_and_reload_is_exact(smollm2, statistics, tmp_path):
    config = LowRankConfig(method="whitened_svd", param_ratio=0.8, calibration=statistics.path)
    streamed, info = AutoModelForCausalLM.from_pretrained(smollm2, lowrank_config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    streamed.save_pretrained(tmp_path, max_shard_size="100MB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, streamed(input_ids=ids).logits)
    report = summary(again)
    assert 0.75 < sum(row.parameters for row in report.rows) / sum(row.dense_parameters for row in report.rows) <= 0.8
    provenance = again.config.quantization_config.to_dict()["recipe"]["calibration"]
    assert provenance["data"] == "train.jsonl"
    assert provenance["tokens"] == 24 * 512


def test_self_calibration_is_deterministic_and_beats_plain_svd(smollm2, wikitext):
    sizes = {"samples": 4, "length": 128}
    states = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(2):
        config = LowRankConfig(param_ratio=0.9, calibration=Calibration(**sizes))
        model = AutoModelForCausalLM.from_pretrained(smollm2, lowrank_config=config)
        states.append(model.state_dict())
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    plain = AutoModelForCausalLM.from_pretrained(smollm2, lowrank_config=LowRankConfig(method="svd", param_ratio=0.9))
    calibrated, free = (perplexity(m, wikitext, window=512, windows=1) for m in (model, plain))
    assert calibrated < free / 100
