"""Few atoms a row: no step makes it worse, plain SVD is a case of it, and structure that is there is found."""

import pytest
import torch

from hf_lowrank import METHODS, ConfigError, DenseSparseLinear, LowRankConfig, RankError, factorize, summary
from hf_lowrank.linalg import truncated_svd
from hf_lowrank.testing import make_weight, tiny_model


DSFormer = METHODS["dsformer"]


def error(weight, factors):
    return float((weight - factors.product()).norm() / weight.norm())


def planted(rows=60, columns=40, atoms=20, terms=3):
    """Rows that are combinations of three atoms each, whose table is of full rank."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows, atoms, generator=generator).argsort(1)[:, :terms]
    codes = torch.randn(rows, terms, generator=generator, dtype=torch.float64)
    table = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, order, codes)
    return table @ torch.randn(atoms, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_with_all_atoms_a_row_it_is_plain_svd(shape):
    weight = make_weight(*shape)
    for rank in (1, 7, 24):
        left, right, _ = truncated_svd(weight, rank)
        found = DSFormer(density=1.0).factorize(weight, rank, {})
        torch.testing.assert_close(found.product(), left @ right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [make_weight(40, 24, decay=0.97), planted()], ids=["decaying", "planted"])
def test_no_sweep_makes_it_worse_and_the_first_start_is_below_svd_of_as_many_terms(weight):
    errors = [error(weight, DSFormer(sweeps=sweeps).factorize(weight, 16, {})) for sweeps in range(7)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0]
    left, right, _ = truncated_svd(weight, 4)
    assert errors[0] <= float((weight - left @ right).norm() / weight.norm())


def test_structure_that_is_there_is_found_where_low_rank_of_the_same_bytes_finds_none():
    weight = planted()
    found = DSFormer(density=0.15, sweeps=20).factorize(weight, 20, {})
    assert ((found.left != 0).sum(1) <= 3).all()
    size = DenseSparseLinear.stored_bytes(*weight.shape, 20, 2, nonzeros=3)
    rank = size // 2 // sum(weight.shape)
    left, right, _ = truncated_svd(weight, rank)
    assert error(weight, found) < 0.6 * float((weight - left @ right).norm() / weight.norm())


def test_blocks_are_factorized_by_themselves():
    weight = make_weight(24, 30, decay=0.97)
    found = DSFormer(blocks=3).factorize(weight, 6, {})
    assert found.left.shape == (24, 18)
    alone = [DSFormer().factorize(part, 6, {}).product() for part in weight.split(8)]
    torch.testing.assert_close(found.product(), torch.cat(alone))
    layer = DenseSparseLinear.from_factors(found, dtype=torch.float64)
    assert (layer.rank, layer.nonzeros, layer.blocks) == (6, 2, 3)
    torch.testing.assert_close(layer.dense_weight(), found.product(), rtol=0, atol=1e-12)


def test_a_budget_counts_atoms_codes_and_masks():
    model, inputs = tiny_model("llama")
    dense = sum(row.dense_parameters for row in summary(factorize(model, LowRankConfig(method="dsformer"))).rows)
    for options in ({"param_ratio": 0.5}, {"param_ratio": 0.5, "method": {"name": "dsformer", "blocks": 2}}):
        model, _ = tiny_model("llama")
        factorize(model, LowRankConfig(**{"method": "dsformer", "rank_multiple": 1, **options}))
        rows = summary(model).rows
        kept = sum(row.parameters for row in rows)
        assert 0.45 * dense < kept <= 0.5 * dense
        assert {row.format for row in rows} == {"dense_sparse"}
        assert torch.isfinite(model(**inputs()).logits).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, r"`density`=0 of dsformer must be a number in \(0, 1\]"),
        ({"density": True}, "`density`=True"),
        ({"blocks": 0}, "`blocks`=0 of dsformer must be an integer of at least 1"),
        ({"sweeps": -1}, "`sweeps`=-1 of dsformer must be an integer of at least 0"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        DSFormer(**options)


def test_what_does_not_fit_a_weight_is_refused_before_any_is_changed():
    model, _ = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="`blocks`=5 of dsformer does not divide the rows of a 64 x 64 weight"):
        factorize(model, LowRankConfig(method={"name": "dsformer", "blocks": 5}))
    pattern = {"layers.1.self_attn.k_proj": 20}
    with pytest.raises(RankError, match="layers.1.self_attn.k_proj: rank=20"):
        factorize(model, LowRankConfig(method={"name": "dsformer", "blocks": 2}, rank_pattern=pattern))
    with pytest.raises(ConfigError, match="`format`='low_rank' cannot hold what `method`='dsformer' makes"):
        LowRankConfig(method="dsformer", format="low_rank")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
