"""What a careful stranger tries: round trips of configs, copies, shared weights, failures half-way."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertModel, GPTQConfig

import hf_lowrank
from hf_lowrank import (
    METHODS,
    LowRankConfig,
    LowRankLinear,
    Statistics,
    collect_statistics,
    factorize,
    summary,
    to_dense,
)
from hf_lowrank.integrations.guard import GUARD
from hf_lowrank.integrations.saving import described
from hf_lowrank.surgery import all_sites, match_sites
from hf_lowrank.testing import tiny_model


def svd(**options):
    return LowRankConfig(**{"method": "svd", "param_ratio": 0.5, **options})


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def small(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama, lowrank_config=svd()).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_config_survives_its_own_json(llama):
    config = svd(param_ratio=0.3, rank_pattern={"q_proj": 4})
    again = LowRankConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    by_dict = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config.to_dict())
    assert torch.equal(run(by_dict), run(AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)))


def test_the_config_of_a_factorized_model_is_a_recipe_for_another(llama, small):
    loaded = AutoModelForCausalLM.from_pretrained(small)
    config = loaded.config.quantization_config
    for given in (
        {"lowrank_config": config},
        {"quantization_config": config},
        {"lowrank_config": config.to_dict()},
        {"quantization_config": config.to_dict()},
    ):
        assert torch.equal(run(AutoModelForCausalLM.from_pretrained(llama, **given)), run(loaded))


def test_a_recipe_that_says_nothing_is_refused(llama):
    with pytest.raises(hf_lowrank.ConfigError, match="`recipe`=5 must be a dict"):
        LowRankConfig.from_dict({"recipe": 5})
    parts = AutoModelForCausalLM.from_pretrained(llama)
    factorize(parts.model.layers[0].mlp, svd())
    with described(parts):
        config = parts.config.quantization_config
        for given in (config, config.to_dict()):
            with pytest.raises(hf_lowrank.ConfigError, match="does not record how it was made"):
                AutoModelForCausalLM.from_pretrained(llama, lowrank_config=given)


@pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("float", torch.float32)])
def test_factors_are_cast_as_ordinary_weights_are(llama, small, tmp_path, cast, dtype):
    for i, given in enumerate((small, llama)):
        config = {} if given is small else {"lowrank_config": svd()}
        model = AutoModelForCausalLM.from_pretrained(given, dtype=torch.bfloat16, **config)
        getattr(model, cast)()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        model.save_pretrained(tmp_path / str(i))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert torch.equal(run(again.to(dtype)), run(model))
        assert not getattr(to_dense(model).config, "_is_quantized", False)


@pytest.mark.parametrize(
    "options", [{"param_ratio": 1.0}, {"param_ratio": None, "rank": 32, "target_modules": ["q_proj"]}]
)
def test_nothing_to_gain_leaves_an_ordinary_model(llama, tmp_path, options, caplog):
    dense = run(AutoModelForCausalLM.from_pretrained(llama))
    loaded = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=svd(**options))
    assert "Nothing becomes smaller" in caplog.text
    memory = factorize(AutoModelForCausalLM.from_pretrained(llama), svd(**options))
    for i, model in enumerate((loaded, memory)):
        assert torch.equal(run(model), dense)
        model.save_pretrained(tmp_path / str(i))
        assert "quantization_config" not in json.loads((tmp_path / str(i) / "config.json").read_text())
        assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / str(i))), dense)


def test_a_missing_factor_is_never_random(small):
    state = load_file(small / "model.safetensors")
    del state["model.layers.1.self_attn.q_proj.left.weight"]
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_lowrank.CheckpointError, match=r"do not agree on model\.layers\.1\.self_attn\.q_proj\.left"):
        AutoModelForCausalLM.from_pretrained(small)


def test_a_forgotten_module_is_never_random(small):
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_lowrank.CheckpointError, match=r"do not agree on model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(small)


def test_dense_weights_under_a_factorized_config_are_refused(small, tmp_path):
    described = (small / "config.json").read_text()
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small))
    dense.save_pretrained(tmp_path / "mixed")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")), run(dense))
    (tmp_path / "mixed" / "config.json").write_text(described)
    with pytest.raises(hf_lowrank.CheckpointError, match="do not agree"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")


DAMAGE = {
    "sparse_low_rank": lambda spec: spec.pop("nonzeros"),
    "weighted_bases": lambda spec: spec.update(format="low_rank"),
    "multi_resolution": lambda spec: spec.pop("levels"),
    "low_rank": lambda spec: spec.update(rank=spec["rank"] - 1),
    "pivoted": lambda spec: spec.update(rank=spec["rank"] + 1),
    "tensor_train": lambda spec: spec.update(format="low_rank", rank=4),
}


@pytest.mark.parametrize("format", DAMAGE)
def test_a_config_that_says_something_else_of_a_layer_is_refused(llama, tmp_path, format):
    only = {name: METHODS[name] for name in METHODS.names() if METHODS[name].format == format}
    method = next((name for name, cls in only.items() if cls.only_format), "svd")
    options = {} if METHODS[method].only_format else {"format": format}
    model = factorize(
        AutoModelForCausalLM.from_pretrained(llama), LowRankConfig(method=method, param_ratio=0.6, **options)
    )
    model.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    DAMAGE[format](config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"])
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_lowrank.CheckpointError, match=r"do not agree on model\.layers\.0\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_the_guard_survives_editing_the_config(small):
    config = AutoConfig.from_pretrained(small)
    config.id2label = {0: "a", 1: "b"}
    config.save_pretrained(small)
    assert json.loads((small / "config.json").read_text())["transformers_weights"] == GUARD
    AutoModelForCausalLM.from_pretrained(small)


def test_a_model_inside_a_module_saves_what_it_is(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_model("llama")[0]
            self.extra = nn.Linear(96, 96)

    wrapper = factorize(Wrapper(), svd())
    assert isinstance(wrapper.extra, LowRankLinear)
    wrapper.lm.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)), run(wrapper.lm))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.ModuleDict({"a": nn.ModuleDict({"m": model})})])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_model_inside_a_module_has_the_targets_that_it_has_alone(architecture, wrap):
    alone, wrapped = tiny_model(architecture)[0], wrap(tiny_model(architecture)[0])
    name = next(name for name, module in wrapped.named_modules() if type(module) is type(alone))
    expected = [f"{name}.{site.name}" for site in match_sites(alone)]
    assert [site.name for site in match_sites(wrapped)] == expected
    assert len(expected) < len(all_sites(wrapped)), "there is a head"


def test_declared_ties_are_found_in_a_model_inside_a_module():
    with torch.device("meta"):
        model, _ = tiny_model("llama")
    model.all_tied_weights_keys = {"model.layers.0.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight"}
    names = {site.name for site in match_sites(nn.ModuleDict({"m": model}))}
    assert {f"m.{site.name}" for site in match_sites(model)} == names
    assert not any("up_proj" in name for name in names) and any("down_proj" in name for name in names)


def test_statistics_of_nothing_are_refused():
    model, inputs = tiny_model("llama")
    with pytest.raises(hf_lowrank.TargetError, match="leaves no linear layer of this LlamaForCausalLM after"):
        collect_statistics(model, [inputs()], exclude_modules=".*")


def test_calibration_data_does_not_stay_with_the_model(llama, tmp_path):
    batch = {"input_ids": torch.arange(3, 40)[None]}
    model = factorize(AutoModelForCausalLM.from_pretrained(llama), calibration=(b for b in [batch]))
    model.save_pretrained(tmp_path)
    copy.deepcopy(model)
    AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=(b for b in [batch])))
    statistics = collect_statistics(AutoModelForCausalLM.from_pretrained(llama), [batch], method="kfac_svd")
    seen = weakref.ref(statistics)
    first = factorize(AutoModelForCausalLM.from_pretrained(llama), calibration=statistics)
    second = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=statistics))
    del statistics
    gc.collect()
    assert seen() is None
    assert torch.equal(run(first), run(second))


@pytest.mark.parametrize("method", ["whitened_svd", "kfac_svd"])
def test_batches_with_labels(method):
    model, inputs = tiny_model("llama")
    batch = inputs()
    plain = collect_statistics(model, [batch], method=method)
    labelled = collect_statistics(model, [{**batch, "labels": batch["input_ids"]}], method=method)
    name = "model.layers.0.mlp.down_proj"
    for statistic in plain.get(name, hf_lowrank.METHODS[method].statistics):
        a, b = (s.get(name, [statistic])[statistic] for s in (plain, labelled))
        torch.testing.assert_close(a, b)


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "twice":
            return self.a(x) + self.b(x) + self.a(100 * x)
        if self.how == "keyword":
            return self.a(input=x) + self.b(input=x)
        first = self.a(x)
        x.mul_(10)
        return first + self.b(x)


def test_a_leader_that_runs_more_often_is_noticed():
    with pytest.raises(hf_lowrank.StatisticsError, match="b read the same input as a at first, but not every time"):
        collect_statistics(Odd("twice"), [{"x": torch.randn(3, 4)}])


def test_a_tensor_changed_in_place_is_another_input():
    x = torch.randn(3, 4)
    statistics = collect_statistics(Odd("in place"), [{"x": x.clone()}])
    a, b = (statistics.get(name, ["input_gram"])["input_gram"] for name in "ab")
    torch.testing.assert_close(b, 100 * a, rtol=1e-5, atol=1e-5)


def test_linears_called_by_keyword():
    x = torch.randn(3, 4)
    statistics = collect_statistics(Odd("keyword"), [{"x": x}])
    expected = (x.T @ x).double()
    torch.testing.assert_close(statistics.get("b", ["input_gram"])["input_gram"], expected, rtol=1e-5, atol=1e-6)


def test_unalignable_padding_is_said(caplog):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.a(x[:, ::2])

    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    collect_statistics(Strided(), [{"x": torch.randn(1, 6, 4), "attention_mask": mask}])
    assert "cannot be matched with the attention mask" in caplog.text


def test_a_failure_half_way_leaves_the_model_as_it_was(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = run(model)
    statistics = collect_statistics(model, [{"input_ids": torch.arange(3, 40)[None]}])
    tensors = {
        owner: {"input_gram": statistics.get(owner, ["input_gram"])["input_gram"].clone()}
        for owner in set(statistics.leaders.values())
    }
    tensors["model.layers.1.mlp.down_proj"]["input_gram"][0, 0] = float("nan")
    bad = Statistics(statistics.leaders, tensors, {})
    config = LowRankConfig(method="whitened_svd", param_ratio=0.5)
    with pytest.raises(hf_lowrank.NonFiniteError, match="layers.1.mlp.down_proj: The Gram matrix"):
        factorize(model, config, calibration=bad)
    assert not summary(model).rows
    assert torch.equal(run(model), before)
    factorize(model, config, calibration=statistics)


def test_factors_that_overflow_half_precision_are_refused():
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).half()
    model[0].weight.data.fill_(60000.0)
    with pytest.raises(hf_lowrank.NonFiniteError, match=r"0\.(left|right)\.weight in torch\.float16"):
        factorize(model, svd(rank_pattern={"0": 2}))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_pickle_copy_and_release(name):
    model, inputs = tiny_model(name)
    factorize(model, svd())
    with torch.no_grad():
        expected = model(**inputs()).logits
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(other(**inputs()).logits, expected)
    gc.collect()
    gc.disable()
    try:
        layer = weakref.ref(model.model.layers[0].self_attn.q_proj)
        del model
        assert layer() is None, "freed without a garbage collection"
    finally:
        gc.enable()


def test_state_dict_in_place_of_files():
    model, _ = tiny_model("bert")
    loaded, info = BertModel.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), lowrank_config=svd(), output_loading_info=True
    )
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert type(loaded.pooler.dense) is nn.Linear
    assert isinstance(loaded.encoder.layer[0].output.dense, LowRankLinear)


def test_a_missing_bias_leaves_no_ghost(tmp_path):
    model, _ = tiny_model("bert")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["bert.encoder.layer.0.intermediate.dense.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, lowrank_config=svd(), output_loading_info=True)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert info["missing_keys"] == {f"{name}.left.bias"}
    assert set(loaded.get_submodule(name).state_dict()) == {"left.weight", "left.bias", "right.weight"}
    assert not loaded.get_submodule(name).left.bias.is_meta


def test_shared_weights_of_plain_modules_stay_shared():
    shared = nn.Linear(16, 16)
    tied = nn.Sequential(shared, nn.Linear(16, 16), nn.Linear(16, 16), shared)
    tied[2].weight = tied[1].weight
    tied.append(nn.Linear(16, 16))
    factorize(tied, svd())
    assert [type(layer) for layer in tied] == [nn.Linear] * 4 + [LowRankLinear]
    assert tied[0] is tied[3]
    with pytest.raises(hf_lowrank.TargetError, match="whose weight is tied"):
        factorize(nn.Sequential(shared, shared), svd(target_modules=["0"]))


def test_a_linear_at_the_root():
    layer = nn.Linear(16, 16)
    made = factorize(layer, svd())
    assert isinstance(made, LowRankLinear)
    assert type(to_dense(made)) is nn.Linear
    with pytest.raises(hf_lowrank.TargetError, match="is itself one layer; put it into a module"):
        hf_lowrank.rank_profile(layer)


def test_other_quantizers_are_respected():
    model, _ = tiny_model("llama")
    model.hf_quantizer = type("Other", (), {"quantization_config": GPTQConfig(bits=4)})()
    with pytest.raises(hf_lowrank.ConfigError, match="quantized with .*; factorize the model it was made from"):
        factorize(model, svd())
    to_dense(model)
    assert hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_what_is_frozen_stays_frozen(name):
    model, _ = tiny_model(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad = key.endswith("bias")
    factorize(model, svd())
    assert all(p.requires_grad == key.endswith("bias") for key, p in model.named_parameters())
    to_dense(model)
    assert all(p.requires_grad == key.endswith("bias") for key, p in model.named_parameters())


def test_train_mode_of_single_layers_is_kept():
    model, inputs = tiny_model("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    collect_statistics(model, [inputs()])
    assert [module.training for module in model.modules()] == modes


def test_self_samples_ignore_the_models_own_generation_settings():
    from hf_lowrank import Calibration
    from hf_lowrank.integrations.self_samples import sample_from

    model, _ = tiny_model("llama")
    sizes = Calibration(samples=6, length=32, batch_size=2)
    plain = sample_from(model, sizes, seed=0)
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.num_return_sequences = 2
    model.generation_config.return_dict_in_generate = True
    assert plain.shape == (6, 32)
    assert torch.equal(sample_from(model, sizes, seed=0), plain)
    assert not torch.equal(sample_from(model, sizes, seed=1), plain)
    assert model.generation_config.num_return_sequences == 2


def test_self_calibration_of_a_model_that_also_sees_is_refused_early(tmp_path):
    model, _ = tiny_model("llava")
    model.save_pretrained(tmp_path)
    with pytest.raises(hf_lowrank.CalibrationError, match="which LlavaForConditionalGeneration is not"):
        type(model).from_pretrained(tmp_path, lowrank_config=LowRankConfig())


@pytest.mark.parametrize("device", ["cudaa", "cuda:77", 3.5])
def test_a_device_that_is_not_there(device):
    with pytest.raises(hf_lowrank.ConfigError, match="`compute_device`=.* cannot be used here"):
        LowRankConfig(compute_device=device)


def test_a_device_may_be_given_as_torch_has_it(tmp_path):
    model, _ = tiny_model("llama")
    factorize(model, svd(compute_device=torch.device("cpu"))).save_pretrained(tmp_path / "small")
    recipe = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["compute_device"] == "cpu"
    with pytest.raises(hf_lowrank.ConfigError, match="`compute_device`='meta' computes nothing"):
        svd(compute_device="meta")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_that_factors_cannot_be_computed_of_are_refused_before_any_is_touched(dtype):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].to(dtype) if dtype.is_complex else setattr(model[1].weight, "data", model[1].weight.data.to(dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(hf_lowrank.TargetError, match=rf"The weight of 1 is of {dtype}, .*`exclude_modules`"):
        factorize(model, svd())
    assert all(type(layer) is nn.Linear for layer in model)
    assert all(torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
               for name, tensor in model.state_dict().items())  # fmt: skip
    factorize(model, svd(exclude_modules=["1"]))
    assert isinstance(model[0], LowRankLinear)


def test_a_name_is_no_model():
    with pytest.raises(hf_lowrank.ConfigError, match="`model`='me/model' must be a model in memory"):
        factorize("me/model", svd())
    for verb in (collect_statistics, to_dense, summary):
        for model in ("me/model", None):
            with pytest.raises(hf_lowrank.ConfigError, match=f"`model`={model!r} must be a model in memory; load"):
                verb(model)


@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model", "inside"])
def test_adapters_are_not_factorized(wrap):
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model("llama")
    adapter = peft.LoraConfig(target_modules=["q_proj"], r=8)
    if wrap == "add_adapter":
        model.add_adapter(adapter)
    else:
        peft_model = peft.get_peft_model(model, adapter)
        model = peft_model if wrap == "get_peft_model" else peft_model.base_model.model
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(hf_lowrank.TargetError, match=r"layers.0.self_attn.q_proj carries adapters; call `merge_and"):
        factorize(model, svd())
    with pytest.raises(hf_lowrank.TargetError, match="carries adapters"):
        collect_statistics(model, [inputs()])
    assert [type(module) for module in model.modules()] == kinds
    if wrap == "get_peft_model":
        assert isinstance(factorize(model.merge_and_unload(), svd()).model.layers[0].self_attn.q_proj, LowRankLinear)


def test_a_compiled_model_is_compiled_after_it_is_factorized():
    model, inputs = tiny_model("llama")
    for verb in (lambda one: factorize(one, svd()), lambda one: collect_statistics(one, [inputs()])):
        with pytest.raises(hf_lowrank.TargetError, match="The model is compiled; give what was compiled"):
            verb(torch.compile(model, backend="eager"))


def test_a_budget_that_cannot_be_met_is_said(caplog):
    factorize(tiny_model("llama")[0], svd(param_ratio=None, target_params=1))
    assert "The budget is 1 parameters, but even the smallest allowed ranks keep" in caplog.text


def test_a_global_rank_leaves_weights_dense_that_have_no_room_for_it():
    model = nn.ModuleDict({"wide": nn.Linear(96, 96), "square": nn.Linear(40, 40), "narrow": nn.Linear(8, 96)})
    factorize(model, svd(param_ratio=None, rank=30))
    assert model["wide"].rank == 30
    assert type(model["square"]) is type(model["narrow"]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rank_pattern": {"narrow": 9}}, "narrow"),
        ({"rank": 97}, "wide"),
        ({"rank": 60}, "narrow"),
        ({"rank_pattern": {"wide": 9}}, "narrow"),
    ],
)
def test_a_rank_for_one_weight_has_to_fit_and_so_has_one_that_makes_none_smaller(options, name):
    model = nn.ModuleDict({"wide": nn.Linear(96, 96), "narrow": nn.Linear(8, 96)})
    with pytest.raises(hf_lowrank.RankError, match=f"for {name} must be an integer in 1"):
        factorize(model, svd(**{"param_ratio": None, "rank": 30, **options}))


def test_the_first_matching_rank_counts():
    pattern = {"q_proj": 8, "layers.0.self_attn.q_proj": 4}
    model = factorize(tiny_model("llama")[0], svd(rank_pattern=pattern))
    assert model.model.layers[0].self_attn.q_proj.rank == 8


def test_auto_model_of_parts(small, tmp_path):
    base = AutoModel.from_pretrained(small)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)
