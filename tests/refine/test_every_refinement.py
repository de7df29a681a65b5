"""What holds of any refinement: what it trains, what it leaves alone, and that what it made can be kept."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from walks import batches_of

from hf_lowrank import ConfigError, LowRankConfig, factorize
from hf_lowrank.refine import REFINEMENTS
from hf_lowrank.testing import tiny_model


OPTIONS = {"method": "svd", "param_ratio": 0.4, "rank_multiple": 1}
everyone = pytest.mark.parametrize("refine", REFINEMENTS.names())


@everyone
def test_no_epochs_change_nothing(refine):
    model, inputs = tiny_model("llama")
    plain, batches = copy.deepcopy(model), batches_of(inputs)
    factorize(plain, LowRankConfig(**OPTIONS), calibration=batches)
    factorize(model, LowRankConfig(**OPTIONS, refine={"name": refine, "epochs": 0}), calibration=batches)
    for (name, one), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@everyone
def test_only_the_blocks_change_and_flags_stay(refine):
    model, inputs = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    factorize(model, LowRankConfig(**OPTIONS, refine=refine), calibration=batches_of(inputs))
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("model.layers.") for name in changed)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.layers.0.input_layernorm.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


@everyone
def test_what_the_user_keeps_is_kept(refine):
    """A weight that the budget leaves dense may move; one that is left out or pinned, and a router, may not."""
    model, inputs = tiny_model("mixtral")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = LowRankConfig(
        method="svd",
        energy=0.999,
        exclude_modules=["v_proj"],
        rank_pattern={"o_proj": "dense", "q_proj": 8},
        refine=refine,
    )
    factorize(model, config, calibration=batches_of(inputs))
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    dense = {name for name in before if name in dict(model.named_parameters()) and "k_proj" in name}
    assert dense and dense <= moved
    assert any("layernorm" in name for name in moved)
    assert not [name for name in moved if "v_proj" in name or "o_proj" in name or ".gate." in name]


@everyone
def test_padding_is_not_trained_on(refine):
    model, _ = tiny_model("llama")
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    states = []
    for filler in (0, 50):
        twin = copy.deepcopy(model)
        batch = {"input_ids": ids.masked_fill(mask == 0, filler), "attention_mask": mask}
        factorize(twin, LowRankConfig(**OPTIONS, refine=refine), calibration=[batch])
        states.append(twin.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


@everyone
def test_from_pretrained_refines_saves_and_reloads(refine, tmp_path):
    model, inputs = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    batches = batches_of(inputs)
    config = LowRankConfig(**OPTIONS, refine=refine, calibration=batches)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", lowrank_config=config, output_loading_info=True
    )
    assert not info["missing_keys"]
    expected = factorize(model, LowRankConfig(**OPTIONS, refine=refine), calibration=batches).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, expected(**batches[0]).logits)
        loaded.save_pretrained(tmp_path / "small")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert torch.equal(again(**batches[0]).logits, loaded(**batches[0]).logits)
    assert again.config.quantization_config.recipe["refine"] == refine


@everyone
def test_a_step_takes_as_many_sequences_as_asked(refine):
    model, inputs = tiny_model("llama")
    fours = [{name: torch.cat([x, x + 1]) for name, x in batch.items()} for batch in batches_of(inputs, 2)]
    twos = [{"input_ids": half} for batch in fours for half in batch["input_ids"].split(2)]

    def states(batches, size):
        config = LowRankConfig(**OPTIONS, refine={"name": refine, "batch_size": size})
        return factorize(copy.deepcopy(model), config, calibration=batches).state_dict()

    def same(one, other):
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    assert same(states(fours, 2), states(twos, None))
    assert same(states(fours, 8), states(fours, None))
    assert not same(states(fours, 2), states(fours, None))


def test_only_what_counts_sequences_is_split():
    refinement = REFINEMENTS["logits"](batch_size=2)
    ids, mask = torch.arange(15).view(5, 3), torch.ones(5, 3, dtype=torch.long)
    mask[2:4] = 0
    found = refinement.split([{"input_ids": ids, "attention_mask": mask, "use_cache": False}])
    assert [piece["input_ids"].tolist() for piece in found] == [ids[:2].tolist(), ids[4:].tolist()]
    assert all(
        piece["use_cache"] is False and len(piece["attention_mask"]) == len(piece["input_ids"]) for piece in found
    )
    for other in ({"position_ids": torch.arange(3)[None]}, {"scale": torch.tensor(1.0)}, {"past": (ids,)}):
        batch = {"input_ids": ids, **other}
        assert refinement.split([batch]) == [batch]


@everyone
def test_no_sequence_a_step_is_refused(refine):
    with pytest.raises(ConfigError, match=f"`batch_size`=0 of {refine} must be an integer of at least 1"):
        LowRankConfig(refine={"name": refine, "batch_size": 0})
