"""What is special to mixed-rank layers: two branches, who gets the gradient, and the model that is left."""

import copy
import json

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_lowrank import (
    FORMATS,
    CheckpointError,
    ConfigError,
    LowRankConfig,
    LowRankLinear,
    MixedRankConfig,
    NonFiniteError,
    RankError,
    StatisticsError,
    TargetError,
    UnknownNameError,
    WaraConfig,
    collect_statistics,
    factorize,
)
from hf_lowrank.draws import draw, two_branch_layers
from hf_lowrank.formats import FormatLinear
from hf_lowrank.methods import Factors
from hf_lowrank.testing import make_weight, tiny_model
from hf_lowrank.tuners.mixed_rank import MixedRankLinear


def without_dropout(model):
    """`model`, whose passes in training mode compare."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def adapted(architecture="llama", dtype=torch.float32, cast=True, **options):
    """A model with mixed-rank layers, the dense model, and inputs."""
    dense, inputs = tiny_model(architecture)
    without_dropout(dense)
    # Parameters only: a checkpoint that is loaded in bfloat16 has its rotary frequencies in float32.
    for parameter in dense.parameters():
        parameter.data = parameter.data.to(dtype)
    model = peft.get_peft_model(copy.deepcopy(dense), MixedRankConfig(**options), autocast_adapter_dtype=cast)
    return model, dense, inputs()


def step(model, inputs, probability=None, drawn=None):
    """Logits in training mode."""
    model.train()
    if drawn is None:
        draw(model, probability, seed=0, step=0)
    for layer in two_branch_layers(model).values() if drawn is not None else ():
        layer.drawn = drawn
    return model(**inputs).logits


def evaluate(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def shake(model):
    """Move every parameter of the adapter a little, as training does."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("dtype", "cast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_at_probability_one_it_is_the_dense_model(architecture, dtype, cast):
    for train_full in (True, False):
        model, dense, inputs = adapted(architecture, dtype, cast, train_full=train_full)
        assert torch.equal(step(model, inputs, 1.0), evaluate(dense, inputs))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("dtype", "cast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_at_probability_zero_it_is_the_finished_model(architecture, dtype, cast, tmp_path):
    model, _, inputs = adapted(architecture, dtype, cast)
    shake(model)
    trained = step(model, inputs, 0.0).detach()
    assert torch.equal(evaluate(model, inputs), trained), "evaluation asks the factors, whatever was drawn"
    step(model, inputs, 1.0)
    assert torch.equal(evaluate(model, inputs), trained)
    ranks = model.peft_config["default"].ranks
    finished = model.merge_and_unload()
    assert torch.equal(evaluate(finished, inputs), trained)
    layers = {name: m for name, m in finished.named_modules() if isinstance(m, LowRankLinear)}
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert not two_branch_layers(finished)
    finished.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "lowrank"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(evaluate(again, inputs), trained)
    assert type(again.get_submodule(next(iter(ranks)))) is LowRankLinear


def test_untrained_it_is_what_factorizing_gives():
    model, dense, inputs = adapted(param_ratio=0.4)
    expected = factorize(dense, LowRankConfig("svd", 0.4, format="low_rank"))
    assert torch.equal(evaluate(model, inputs), evaluate(expected, inputs))


def test_methods_with_statistics_and_allocations(tmp_path):
    dense, inputs = tiny_model("llama")
    file = str(tmp_path / "statistics.safetensors")
    collect_statistics(dense, [inputs()], method="kfac_svd").save(file)
    options = {"method": "kfac_svd", "param_ratio": 0.5, "rank_multiple": 1}
    model = peft.get_peft_model(copy.deepcopy(dense), MixedRankConfig(statistics=file, **options))
    ranks = model.peft_config["default"].ranks
    assert len(set(ranks.values())) > 3, "the knapsack gives layers of one shape different ranks"
    expected = factorize(dense, LowRankConfig(format="low_rank", **options), calibration=file)
    assert torch.equal(evaluate(model, inputs()), evaluate(expected, inputs()))
    # Loading needs neither the statistics nor the weights' decomposition.
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "statistics.safetensors").unlink()
    again = peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path / "adapter")
    assert again.peft_config["default"].ranks == ranks
    assert torch.equal(evaluate(again, inputs()), evaluate(model, inputs()))


def test_a_mixed_draw_is_layer_by_layer():
    model, dense, inputs = adapted(target_modules=["q_proj", "down_proj"])
    shake(model)
    layers = two_branch_layers(model)
    hybrid = copy.deepcopy(dense)
    finished = copy.deepcopy(model).merge_and_unload()
    draw(model, 0.5, seed=0, step=4)
    assert len({layer.drawn for layer in layers.values()}) == 2
    for name, layer in layers.items():
        own = name.removeprefix("base_model.model.")
        if layer.drawn:
            hybrid.get_submodule(own).weight.data = layer.mixed_rank_full["default"].data
        else:
            hybrid.set_submodule(own, finished.get_submodule(own))
    assert torch.equal(model.train()(**inputs).logits, evaluate(hybrid, inputs))


@pytest.mark.parametrize("train_full", [True, False])
def test_only_what_was_drawn_gets_a_gradient(train_full):
    model, _, inputs = adapted(train_full=train_full)
    draw(model, 0.5, seed=0, step=0)
    model.train()(**inputs).logits.square().mean().backward()
    layers = two_branch_layers(model).values()
    assert {layer.drawn for layer in layers} == {True, False}
    for layer in layers:
        full = layer.mixed_rank_full["default"].grad if train_full else None
        left, right = layer.mixed_rank_left["default"].grad, layer.mixed_rank_right["default"].grad
        if layer.drawn:
            assert left is None and right is None
            assert not train_full or full.any()
        else:
            assert full is None
            assert left.any() and right.any()
        assert layer.base_layer.weight.grad is None


def test_a_step_that_draws_nothing_trainable_moves_nothing():
    model, _, inputs = adapted(train_full=False)
    step(model, inputs, 1.0).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_zeros_of_a_pruned_weight_stay(keep_zeros):
    dense, inputs = tiny_model("llama")
    pruned = dense.model.layers[0].self_attn.q_proj.weight
    mask = torch.rand(pruned.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    pruned.data[mask] = 0
    expected = evaluate(dense, inputs())
    model = peft.get_peft_model(dense, MixedRankConfig(target_modules=["q_proj"], keep_zeros=keep_zeros))
    assert torch.equal(step(model, inputs(), 1.0), expected)
    full = next(iter(two_branch_layers(model).values())).mixed_rank_full["default"]
    optimizer = torch.optim.AdamW([full], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, inputs(), 1.0).square().mean().backward()
        optimizer.step()
    assert (full[~mask] != pruned.data[~mask]).all()
    assert (full[mask] == 0).all() == keep_zeros


def test_training_without_a_draw_is_refused():
    model, _, inputs = adapted()
    with pytest.raises(ConfigError, match="no branch was drawn: add `MixedRankCallback"):
        model.train()(**inputs)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_merging_is_the_product_in_float64(kind):
    layer = nn.Linear(10, 16, dtype=torch.float64) if kind is nn.Linear else Conv1D(16, 10).double()
    model = peft.get_peft_model(nn.Sequential(layer, nn.Linear(16, 2)), MixedRankConfig(r=3, target_modules=["0"]))
    wrapped = model.base_model.model[0].eval()
    shake(model)
    x = torch.randn(5, 10, dtype=torch.float64)
    expected, base = wrapped(x), wrapped.base_layer(x)
    delta = wrapped.get_delta_weight("default")
    update = x @ (delta if kind is Conv1D else delta.T)
    torch.testing.assert_close(base + update, expected, rtol=0, atol=1e-12)
    before = layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(wrapped.get_delta_weight("default"), delta), "also while it is merged"
    assert torch.linalg.matrix_rank(layer.weight) == 3
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_making_factors_leaves_other_randomness_alone():
    model, _ = tiny_model("llama")
    before = torch.random.get_rng_state()
    peft.get_peft_model(model, MixedRankConfig())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_users_configuration_serves_many_models():
    config = MixedRankConfig(r=8)
    for architecture in ("llama", "gpt2"):
        model, inputs = tiny_model(architecture)
        model = peft.get_peft_model(model, config)
        assert set(model.peft_config["default"].ranks.values()) == {8}
        assert evaluate(model, inputs()).isfinite().all()
    assert config.ranks is None


def test_the_configuration_of_an_adapter_makes_another(tmp_path):
    model, dense, inputs = adapted(r=8, target_modules=["up_proj"])
    expected = evaluate(model, inputs)
    model.save_pretrained(tmp_path)
    model.add_adapter("again", model.peft_config["default"])
    model.set_adapter("again")
    assert torch.equal(evaluate(model, inputs), expected)
    # That of a file means that its factors follow.
    config = peft.PeftConfig.from_pretrained(str(tmp_path), inference_mode=False)
    empty = peft.get_peft_model(copy.deepcopy(dense), config)
    for use in (lambda: evaluate(empty, inputs), empty.merge_adapter, empty.merge_and_unload):
        with pytest.raises(CheckpointError, match="'default' were not loaded.*`ranks`=None"):
            use()
    empty.load_adapter(tmp_path, "default")
    assert torch.equal(evaluate(empty, inputs), expected)


def test_no_other_tuner_around_or_inside():
    targets = {"target_modules": ["q_proj", "up_proj"]}
    for outer in (peft.LoraConfig(**targets), WaraConfig(**targets)):
        model, _, _ = adapted(**targets)
        with pytest.raises(ConfigError, match=r"q_proj carries a MIXED_RANK adapter.*`merge_and_unload\(\)`"):
            peft.get_peft_model(model.get_base_model(), outer, adapter_name="outer")
        # Beside it, there is no reason not to.
        beside = type(outer)(target_modules=["down_proj"])
        peft.get_peft_model(model.get_base_model(), beside, adapter_name="beside")
    model = peft.get_peft_model(tiny_model("llama")[0], peft.LoraConfig(**targets))
    with pytest.raises(ConfigError, match=r"q_proj: it carries an adapter of another tuner \(Linear\)"):
        peft.get_peft_model(model.get_base_model(), MixedRankConfig(**targets), adapter_name="inner")


def test_what_is_unloaded_is_what_was_named():
    def two():
        model, _, inputs = adapted(r=8, target_modules=["q_proj"])
        model.add_adapter("other", MixedRankConfig(r=16, target_modules=["q_proj"]))
        return model, inputs

    model, inputs = two()
    model.set_adapter("other")
    expected = evaluate(model, inputs)
    model, _ = two()
    finished = model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(evaluate(finished, inputs), expected)
    assert finished.config.quantization_config.rank == 16
    model, _ = two()
    model.merge_adapter(["default"])
    with pytest.raises(ConfigError, match=r"\['default', 'other'\] would each put factors"):
        model.merge_and_unload(adapter_names=["other"])
    for names in (["nope"], "other"):
        with pytest.raises(ConfigError, match=r"`adapter_names`=.* a list of names.* \['default', 'other'\]"):
            model.merge_and_unload(adapter_names=names)


def test_layers_that_would_not_shrink_stay_dense():
    model, _, _ = adapted(r=16)
    ranks = model.peft_config["default"].ranks
    assert "model.layers.0.self_attn.q_proj" in ranks
    # 16 (32 + 64) numbers or more are not fewer than 32 x 64 from rank 22 on.
    model, _, _ = adapted(r=24)
    ranks = model.peft_config["default"].ranks
    assert not any("k_proj" in name or "v_proj" in name for name in ranks)
    assert len(two_branch_layers(model)) == len(ranks) == 10


def test_ranks_by_name_also_beside_another_adapter():
    pattern = {"q_proj": 5, "layers.1.mlp.*": 7}
    model, _, inputs = adapted(r=8, rank_pattern=pattern, target_modules=["q_proj", "up_proj"])
    first = model.peft_config["default"].ranks
    assert first == {
        "model.layers.0.self_attn.q_proj": 5, "model.layers.1.self_attn.q_proj": 5,
        "model.layers.0.mlp.up_proj": 8, "model.layers.1.mlp.up_proj": 7,
    }  # fmt: skip
    alone = evaluate(model, inputs)
    model.add_adapter("second", MixedRankConfig(r=8, rank_pattern=pattern, target_modules=["q_proj", "up_proj"]))
    assert model.peft_config["second"].ranks == first
    model.set_adapter("second")
    assert torch.equal(evaluate(model, inputs), alone), "made from the same weights"


def test_an_expression_that_also_matches_what_is_inside_an_adapter():
    model, _, inputs = adapted(r=8, target_modules=".*q_proj.*")
    model.add_adapter("second", MixedRankConfig(r=6, target_modules=".*q_proj.*"))
    assert model.peft_config["second"].ranks.keys() == model.peft_config["default"].ranks.keys()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 0}, ConfigError, "`r`=0 must be an integer of at least 1"),
        ({"r": 4, "param_ratio": 0.5}, ConfigError, "Give one budget"),
        ({"param_ratio": 1.5}, ConfigError, "`param_ratio`=1.5"),
        ({"train_full": "yes"}, ConfigError, "`train_full`='yes' must be True or False"),
        ({"keep_zeros": 1}, ConfigError, "`keep_zeros`=1"),
        ({"method": "fsvd"}, UnknownNameError, "Unknown method 'fsvd'"),
        ({"method": "kfac_svd"}, ConfigError, r"collect_statistics\(model, method='kfac_svd'\)"),
        ({"statistics": "s.safetensors"}, ConfigError, "would not be read: `method`='svd' needs none"),
        ({"method": "kfac_svd", "statistics": "s.pt"}, ConfigError, "must name a .safetensors file"),
        ({"method": "basis_sharing"}, ConfigError, "made one by one"),
        ({"method": "feature_pca"}, ConfigError, "made one by one"),
        ({"method": "anchored_svd"}, ConfigError, "made one by one"),
        ({"allocation": "bayes"}, ConfigError, "an adapter does not have"),
        ({"bias": "wara_only"}, ConfigError, "mixed_rank_only"),
        ({"rank_pattern": {"q_proj": "low"}}, ConfigError, "must be an integer of at least 1, or 'dense'"),
        ({"ranks": 4}, ConfigError, "`ranks`=4"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        MixedRankConfig(**options)


def untouched(model):
    return not any(isinstance(module, MixedRankLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 65, "target_modules": ["q_proj"]}, RankError, "q_proj: rank 65 exceeds min.* = 64; lower it in `r`"),
        ({"rank_pattern": {"k_proj": 33}}, RankError, "k_proj: rank 33 exceeds"),
        ({"r": 40, "target_modules": ["q_proj"]}, ConfigError, "factors of none of the 2 targeted layers are smaller"),
        ({"target_modules": ["embed_tokens"]}, TargetError, "Embedding"),
        ({"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(options, error, match):
    model, _ = tiny_model("llama")
    with pytest.raises(error, match=match):
        peft.get_peft_model(model, MixedRankConfig(**options))
    assert untouched(model)


def test_weights_that_cannot_be_factorized_are_refused():
    model, inputs = tiny_model("llama")
    factorize(model, LowRankConfig("sparse_low_rank", 0.5))
    with pytest.raises(TargetError, match="q_proj: .*'sparse_low_rank' is not the product of two.*to_dense"):
        peft.get_peft_model(model, MixedRankConfig())
    assert untouched(model)
    model, inputs = tiny_model("llama")
    factorize(model, LowRankConfig("svd", 0.5))
    with pytest.raises(RankError, match="q_proj: `rank_pattern` gives rank 3 .* keeps its own; call hf_lowrank.trunc"):
        peft.get_peft_model(model, MixedRankConfig(rank_pattern={"q_proj": 3}))
    assert untouched(model)
    model, inputs = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="layers.1.mlp.up_proj"):
        peft.get_peft_model(model, MixedRankConfig())
    assert untouched(model)
    model, inputs = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.ds_id = 4
    with pytest.raises(TargetError, match="up_proj: DeepSpeed ZeRO-3 has split its weight"):
        peft.get_peft_model(model, MixedRankConfig())
    assert untouched(model)
    with pytest.raises(ConfigError, match="`low_cpu_mem_usage`=True"):
        peft.get_peft_model(tiny_model("llama")[0], MixedRankConfig(), low_cpu_mem_usage=True)


def test_statistics_of_another_model_are_refused(tmp_path):
    other, inputs = tiny_model("gpt2")
    file = str(tmp_path / "statistics.safetensors")
    collect_statistics(other, [inputs()], method="whitened_svd").save(file)
    model, _ = tiny_model("llama")
    with pytest.raises(StatisticsError, match="another model"):
        peft.get_peft_model(model, MixedRankConfig(method="whitened_svd", statistics=file))
    assert untouched(model)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, _, _ = adapted(r=12, target_modules=["o_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["ranks"]["model.layers.0.self_attn.o_proj"] == 12
    config["ranks"]["model.layers.0.self_attn.o_proj"] = 65
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rank 65 for this layer, whose min.* is 64"):
        peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path)


def test_factors_that_are_not_finite_are_not_merged():
    model, _, inputs = adapted(target_modules=["q_proj"])
    layer = next(iter(two_branch_layers(model).values()))
    layer.mixed_rank_left["default"].data[0, 0] = torch.inf
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteError):
            merge()


@pytest.mark.parametrize("bias", ["none", "mixed_rank_only", "all"])
def test_biases_end_in_the_finished_model(bias, tmp_path):
    model, dense, inputs = adapted("qwen2", bias=bias, target_modules=["q_proj"])
    shake(model)
    expected = evaluate(model, inputs)
    finished = model.merge_and_unload()
    assert torch.equal(evaluate(finished, inputs), expected)
    for name, same in (("q_proj", bias == "none"), ("k_proj", bias != "all")):
        one, other = (m.model.layers[0].self_attn.get_submodule(name).bias for m in (finished, dense))
        assert torch.equal(one, other) == same
    finished.save_pretrained(tmp_path)
    assert torch.equal(evaluate(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), expected)


def check_both_branches(model, inputs, before):
    """The factors in training and in evaluation, and their product, are the factorized model."""
    torch.testing.assert_close(evaluate(model, inputs), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step(model, inputs, drawn=False), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step(model, inputs, drawn=True), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_full", [True, False])
@pytest.mark.parametrize(
    ("architecture", "format", "exact"),
    [("llama", "low_rank", True), ("qwen2", "pivoted", False), ("gpt2", "low_rank", True), ("gpt2", "pivoted", False)],
)
def test_a_factorized_model_goes_on_from_its_own_factors(architecture, format, exact, train_full, tmp_path):
    dense, inputs = tiny_model(architecture)
    inputs = inputs()
    factorize(dense, LowRankConfig("svd", 0.6, format=format)).save_pretrained(tmp_path / "start")
    start = without_dropout(AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
    ranks = {name: m.rank for name, m in start.named_modules() if isinstance(m, FormatLinear)}
    before, weights = evaluate(start, inputs), copy.deepcopy(start.state_dict())
    model = peft.get_peft_model(start, MixedRankConfig(train_full=train_full))
    assert model.peft_config["default"].ranks == ranks, "each keeps its rank, whatever the budget"
    check_both_branches(model, inputs, before)
    assert torch.equal(evaluate(model, inputs), before) or not exact
    shake(model)
    trained = evaluate(model, inputs)
    assert (trained - before).abs().max() > 1e-3
    layer = next(iter(two_branch_layers(model).values()))
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, inputs), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.get_delta_weight("default"), delta), "also while it is merged"
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, inputs), trained)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "start"), tmp_path / "adapter"
    )
    assert torch.equal(evaluate(again, inputs), trained)
    for name, tensor in copy.deepcopy(again).unload().state_dict().items():
        assert torch.equal(tensor, weights[name]), "the model itself was never changed"
    finished = again.merge_and_unload()
    assert {n: (m.rank, m.name) for n, m in finished.named_modules() if isinstance(m, FormatLinear)} == {
        name: (rank, format) for name, rank in ranks.items()
    }
    torch.testing.assert_close(evaluate(finished, inputs), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(evaluate(finished, inputs), trained) or not exact
    last = evaluate(finished, inputs)
    finished.save_pretrained(tmp_path / "finished")
    assert torch.equal(evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "finished"), inputs), last)


def test_dense_and_factorized_layers_in_one_adapter(tmp_path):
    model, inputs = tiny_model("llama")
    inputs = inputs()
    factorize(model, LowRankConfig("svd", 0.6, format="low_rank", target_modules=["q_proj", "k_proj"]))
    pattern = {"k_proj": "dense", "up_proj": 7}
    config = MixedRankConfig(r=8, rank_pattern=pattern, target_modules=["q_proj", "k_proj", "up_proj"])
    model = peft.get_peft_model(model, config)
    ranks = model.peft_config["default"].ranks
    assert {name.rpartition(".")[2] for name in ranks} == {"q_proj", "up_proj"}
    assert {rank for name, rank in ranks.items() if "up" in name} == {7}
    shake(model)
    trained = evaluate(model, inputs)
    finished = model.merge_and_unload()
    assert torch.equal(evaluate(finished, inputs), trained)
    assert len([m for m in finished.modules() if isinstance(m, LowRankLinear)]) == 6
    finished.save_pretrained(tmp_path)
    assert torch.equal(evaluate(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), trained)


def test_layers_that_share_a_basis_get_factors_of_their_own():
    model, inputs = tiny_model("llama")
    inputs = inputs()
    grouped = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [["q_proj", "k_proj", "v_proj"]]}
    factorize(model, LowRankConfig(grouped, 0.6), calibration=[inputs])
    model = peft.get_peft_model(model, MixedRankConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    shake(model)
    trained = evaluate(model, inputs)
    with pytest.warns(UserWarning, match="Layers that share a basis no longer do"):
        finished = model.merge_and_unload()
    torch.testing.assert_close(evaluate(finished, inputs), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS.names())
@pytest.mark.parametrize("transposed", [False, True])
def test_factorized_layers_of_every_format_are_taken_or_refused(format, transposed):
    factors = Factors(make_weight(16, 4), make_weight(4, 12), 0.0)
    layer = FORMATS[format].from_factors(factors, torch.ones(16), torch.float32, transposed)
    model = nn.Sequential(layer, nn.Linear(16, 2))
    x = torch.randn(3, 12)
    before = model(x).detach()
    try:
        model = peft.get_peft_model(model, MixedRankConfig(target_modules=["0"]))
    except TargetError as error:
        assert format not in ("low_rank", "pivoted", "shared_basis", "weighted_bases")
        assert "0: " in str(error) and "to_dense" in str(error)
        assert model[0] is layer
        return
    shake(model)
    with torch.no_grad():
        trained = model.eval()(x)
        assert not torch.equal(trained, before)
        torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factorized", [False, True])
def test_factors_are_made_of_weights_without_anything_merged(factorized):
    model, _ = tiny_model("llama")
    if factorized:
        factorize(model, LowRankConfig("svd", 0.6))
    model = peft.get_peft_model(model, MixedRankConfig(target_modules=["q_proj"]))
    shake(model)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="An adapter is merged.*`unmerge_adapter"):
        model.add_adapter("second", MixedRankConfig(target_modules=["q_proj"]))
