"""Free rows and a rank for the others: much rank from scratch, and honestly worse than SVD on trained weights."""

import copy

import pytest
import torch
from callback_worker import examples, make
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    METHODS,
    ConfigError,
    FormatLinear,
    HybridRowsLinear,
    LowRankConfig,
    LowRankLinear,
    factorize,
    summary,
)
from hf_lowrank.testing import check_method, make_weight, tiny_model


Hybrid = METHODS["hybrid"]


def error(weight, method, rank):
    return float((weight - method.factorize(weight, rank, {}).product()).norm() / weight.norm())


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FormatLinear)}


@pytest.mark.parametrize("options", [{}, {"lower_rank": 3}, {"dense_rows": 2}, {"selection": "residual"}])
def test_rows_are_exact_and_the_others_are_best(options):
    weight, method = make_weight(30, 20, decay=0.95), Hybrid(**options)
    rank = 6
    lower_rank = options.get("lower_rank", rank - options["dense_rows"] if "dense_rows" in options else 1)
    found = method.factorize(weight, rank, {})
    product = found.product()
    exact = (product - weight).abs().amax(1) < 1e-12
    assert exact.sum() == rank - lower_rank
    energies = torch.linalg.svdvals(weight[~exact]).square()
    torch.testing.assert_close((weight - product).square().sum(), energies[lower_rank:].sum(), rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(product, rtol=1e-9) == rank, "the rank of the paper, j + 1"


def test_without_free_rows_it_is_the_svd():
    weight = make_weight(24, 40)
    found, svd = Hybrid(dense_rows=0).factorize(weight, 5, {}), METHODS["svd"]().factorize(weight, 5, {})
    torch.testing.assert_close(found.product(), svd.product(), rtol=0, atol=1e-12)
    assert found.relative_error == pytest.approx(svd.relative_error, rel=1e-9)


@pytest.mark.parametrize("decay", [0.8, 0.95])
@pytest.mark.parametrize("selection", ["leverage", "residual"])
def test_svd_wins_on_trained_weights_at_equal_numbers(decay, selection):
    """Free rows are no basis chosen for the error, and two factors of the same size are."""
    weight = make_weight(64, 64, decay=decay)
    for rank in (8, 16, 28):
        numbers = HybridRowsLinear.cost(64, 64, rank, lower_rank=1)
        svd = numbers // 128
        assert LowRankLinear.cost(64, 64, svd) <= numbers
        assert error(weight, METHODS["svd"](), svd) < error(weight, Hybrid(selection=selection), rank)


def test_on_a_flat_spectrum_free_rows_win():
    """Of an orthogonal matrix every row is a sixty-fourth, and so is every singular vector at twice the numbers."""
    weight = make_weight(64, 64, decay=1.0)
    found = Hybrid().factorize(weight, 16, {})
    assert found.relative_error**2 == pytest.approx(1 - 16 / 64, rel=1e-6)
    svd = HybridRowsLinear.cost(64, 64, 16, lower_rank=1) // 128
    assert METHODS["svd"]().factorize(weight, svd, {}).relative_error ** 2 == pytest.approx(1 - svd / 64)
    assert svd == 8


@pytest.mark.parametrize("selection", ["leverage", "residual"])
def test_rows_that_stand_out_are_found_where_svd_needs_more(selection):
    generator = torch.Generator().manual_seed(0)
    base = torch.outer(*torch.randn(2, 40, generator=generator, dtype=torch.float64))
    rows = torch.tensor([3, 17, 29])
    base[rows] += 20 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    found = Hybrid(selection=selection).factorize(base, 4, {})
    torch.testing.assert_close(found.product(), base, rtol=0, atol=1e-9)
    assert error(base, METHODS["svd"](), HybridRowsLinear.cost(40, 40, 4, lower_rank=1) // 80) > 0.2


def test_the_laws_hold_with_other_options_and_from_scratch():
    check_method(Hybrid(lower_rank=3, selection="residual"))
    check_method(Hybrid(from_scratch=True))


def test_where_training_begins_has_the_variance_of_a_new_linear():
    found = Hybrid(lower_rank=2, from_scratch=True).factorize(torch.zeros(400, 300), 100, {"seed": 0}).product()
    for rows in (found[:98], found[98:]):
        assert float(rows.std()) == pytest.approx((3 * 300) ** -0.5, rel=0.05)
    assert torch.linalg.matrix_rank(found) == 100


def test_a_model_is_trained_from_scratch_and_reloads(tmp_path):
    model, _ = tiny_model("llama")
    config = LowRankConfig(method={"name": "hybrid", "from_scratch": True}, param_ratio=0.5, rank_multiple=1)
    factorize(model, config)
    for layer in layers(model).values():
        assert layer.rows_first
        assert layer.lower_rank == 1
        two_factors = 0.5 * layer.out_features * layer.in_features / (layer.out_features + layer.in_features)
        assert layer.rank > 1.2 * two_factors
    rows = summary(model).rows
    assert 0.48 < sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows) <= 0.5
    assert all(row.relative_error is None for row in rows)
    start = copy.deepcopy(model.state_dict())
    batch = {key: torch.stack([example[key] for example in examples()]) for key in ("input_ids", "labels")}

    def loss():
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    make(tmp_path, model=model, max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2).train()
    assert loss() < 0.8 * before
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])] == []
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ConfigError, match="`method`='hybrid' starts from scratch, and .* such as 'hybrid'"):
        AutoModelForCausalLM.from_pretrained(dense_checkpoint(tmp_path), lowrank_config=config)


def dense_checkpoint(folder):
    tiny_model("llama")[0].save_pretrained(folder / "dense")
    return folder / "dense"


def test_trained_weights_are_factorized_while_they_load(tmp_path):
    config = LowRankConfig(method="hybrid", param_ratio=0.5, rank_multiple=1)
    loaded = AutoModelForCausalLM.from_pretrained(dense_checkpoint(tmp_path), lowrank_config=config)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        outputs = [m(**tiny_model("llama")[1]()).logits for m in (loaded, again)]
    # Rows of an odd number of bytes are summed in an order that depends on where they start.
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    model = factorize(tiny_model("llama")[0], LowRankConfig(method="hybrid", target_bytes=size, rank_multiple=1))
    model.save_pretrained(tmp_path / "bytes")
    assert 0.96 * size < (tmp_path / "bytes" / "model.safetensors").stat().st_size <= size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dense_rows": -1}, "`dense_rows`=-1 of hybrid must be an integer of at least 0, or 'auto'"),
        ({"dense_rows": "all"}, "`dense_rows`='all'"),
        ({"dense_rows": True}, "`dense_rows`=True"),
        ({"lower_rank": 0}, "`lower_rank`=0 of hybrid must be an integer of at least 1"),
        ({"lower_rank": 2, "dense_rows": 3}, "`lower_rank`=2 and `dense_rows`=3 of hybrid leave nothing"),
        ({"selection": "norm"}, r"`selection`='norm' of hybrid must be one of \['leverage', 'residual'\]"),
        ({"from_scratch": 1}, "`from_scratch`=1 of hybrid must be True or False"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        Hybrid(**options)
