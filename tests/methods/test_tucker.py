"""Of a matrix the SVD; of a stack, the factor of its inputs, stored once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import METHODS, ConfigError, LowRankConfig, SharedBasisLinear, factorize, summary
from hf_lowrank.testing import make_weight, tiny_model


Tucker = METHODS["tucker"]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_of_a_matrix_it_is_plain_svd_with_the_core_folded(shape):
    weight = make_weight(*shape)
    for rank in (1, 7, 24):
        found, plain = (METHODS[name]().factorize(weight, rank, {}) for name in ("tucker", "svd"))
        torch.testing.assert_close(found.product(), plain.product(), rtol=0, atol=1e-10)
        rows, _, columns = torch.linalg.svd(weight)
        core = rows[:, :rank].T @ weight @ columns[:rank].T
        torch.testing.assert_close(rows[:, :rank] @ core @ columns[:rank], found.product(), rtol=0, atol=1e-10)
        assert found.relative_error == pytest.approx(plain.relative_error)


def test_of_a_stack_it_is_the_decomposition_of_order_three_truncated_in_its_inputs():
    stack = make_weight(3 * 12, 20).view(3, 12, 20)
    unfolded = stack.movedim(2, 0).flatten(1)
    for rank in (1, 5, 20):
        found = Tucker().factorize(stack.flatten(0, 1), rank, {})
        basis = torch.linalg.svd(unfolded).U[:, :rank]
        whole = torch.einsum("koi,ir,jr->koj", stack, basis, basis)
        torch.testing.assert_close(found.product().view_as(stack), whole, rtol=0, atol=1e-10)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize(
    "options", [{"joint_groups": [["q_proj", "k_proj", "v_proj"]]}, {"share_layers": 2}], ids=["one input", "layers"]
)
def test_stacks_in_a_model(tmp_path, options):
    dense, _ = tiny_model("llama")
    weights = {name: module.weight.detach() for name, module in dense.named_modules() if name.endswith("_proj")}
    dense.save_pretrained(tmp_path / "dense")
    config = LowRankConfig(
        method={"name": "tucker", **options}, rank=16, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", lowrank_config=config)
    assert {row.format for row in summary(model).rows} == {"shared_basis"}
    first = "model.layers.0.self_attn.q_proj"
    names = [f"model.layers.{b}.self_attn.q_proj" for b in (0, 1)]
    if "joint_groups" in options:
        names = [first.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj")]
    stacked = torch.cat([weights[name] for name in names])
    expected = Tucker().factorize(stacked, 16, {}).product()
    found = torch.cat([model.get_submodule(name).dense_weight() for name in names]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert model.get_submodule(names[-1]).lender is model.get_submodule(first)
    assert isinstance(model.get_submodule(first), SharedBasisLinear)
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(model))
    in_memory = factorize(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), config)
    assert torch.equal(logits(in_memory), logits(model))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="`share_layers`=0 of tucker must be an integer of at least 1"):
        Tucker(share_layers=0)
    with pytest.raises(ConfigError, match="`joint_groups`='qkv' of tucker must be a list of groups"):
        Tucker(joint_groups="qkv")
