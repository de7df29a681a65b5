"""Weights that share a factor: in memory, while loading, saved, reloaded, trained and taken apart again."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import hf_lowrank
from hf_lowrank import ConfigError, LowRankConfig, TargetError, collect_statistics, factorize, summary, to_dense
from hf_lowrank.integrations.streaming import Factorize
from hf_lowrank.plan import make_plan
from hf_lowrank.surgery import factorized, match_sites, specs
from hf_lowrank.testing import tiny_model


QKV, FEED = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
BOTH = {"name": "basis_sharing", "joint_groups": [QKV, FEED]}
JOINT = {**BOTH, "share_layers": 1}
LAYERS = "basis_sharing"
METHODS = {"joint": JOINT, "layers": LAYERS, "both": BOTH, "kfac": {"name": "kfac_svd", "joint_groups": [QKV, FEED]}}
TIMED = {"name": "knapsack", "cost": "latency"}
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs())
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A dense checkpoint, inputs, and statistics of these inputs for every method here."""
    folder = tmp_path_factory.mktemp("groups")
    model, inputs = tiny_model("llama")
    model.save_pretrained(folder / "dense")
    collect_statistics(model, [inputs()], method="kfac_svd").save(folder / "statistics.safetensors")
    return folder, inputs


def config_for(folder, method, **options):
    options = {"param_ratio": 0.5, "rank_multiple": 1, **options}
    return LowRankConfig(method=method, calibration=str(folder / "statistics.safetensors"), **options)


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "dense")


def small(folder, method="joint", **options):
    return factorize(dense(folder), config_for(folder, METHODS[method], **options))


def lenders(model):
    """`{borrower: lender}` of a model, by the specs it would save."""
    return {name: spec["basis"] for name, spec in specs(model).items() if "basis" in spec}


def test_groups_are_what_stands_beside_each_other_and_in_neighbouring_blocks(llama):
    folder, _ = llama
    found = {name: lenders(small(folder, name)) for name in ("joint", "layers", "both")}
    attention = "model.layers.{}.self_attn.{}"
    assert found["joint"][attention.format(1, "v_proj")] == attention.format(1, "q_proj")
    assert found["joint"]["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
    assert len(found["joint"]) == 2 * 3
    assert found["layers"][attention.format(1, "v_proj")] == attention.format(0, "v_proj")
    assert len(found["layers"]) == 7
    assert found["both"][attention.format(1, "v_proj")] == attention.format(0, "q_proj")
    assert len(found["both"]) == 2 * 7 - 4


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (3, [3, 2]), (9, [5])])
def test_blocks_share_with_their_neighbours_and_the_last_with_what_is_left(count, sizes):
    config = copy.deepcopy(tiny_model("llama")[0].config)
    config.num_hidden_layers = 5
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    method = {"name": "basis_sharing", "share_layers": count}
    plan = make_plan(model, LowRankConfig(method=method, target_modules=["up_proj"]))
    blocks = [[member.name.split(".")[2] for member in site.members] for site in plan.sites.values()]
    assert [len(names) for names in blocks] == sizes
    assert sum(blocks, []) == ["0", "1", "2", "3", "4"]
    assert {plan.formats[name] for name, site in plan.sites.items() if len(site.members) == 1} <= {"low_rank"}


def test_an_encoder_and_a_decoder_share_nothing():
    model, _ = tiny_model("t5")
    plan = make_plan(model, LowRankConfig(method={"name": "basis_sharing", "share_layers": 9}))
    assert all(len({m.name.partition(".")[0] for m in site.members}) == 1 for site in plan.sites.values())
    assert {len(site.members) for site in plan.sites.values()} == {2}


@pytest.mark.parametrize("method", METHODS)
def test_in_memory_while_loading_and_reloaded_are_one_model(llama, tmp_path, method):
    folder, inputs = llama
    config = config_for(folder, METHODS[method])
    in_memory = factorize(dense(folder), config)
    streamed, info = AutoModelForCausalLM.from_pretrained(
        folder / "dense", lowrank_config=config, output_loading_info=True
    )
    assert info == CLEAN
    assert torch.equal(logits(in_memory, inputs), logits(streamed, inputs))
    for i, model in enumerate((in_memory, streamed)):
        model.save_pretrained(tmp_path / str(i), max_shard_size="20KB")
        assert len(list((tmp_path / str(i)).glob("*.safetensors"))) > 1
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(i), output_loading_info=True)
        assert info == CLEAN
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        assert str(summary(again)) == str(summary(model))
        assert lenders(again) == lenders(model) != {}
        for name, lender in lenders(again).items():
            assert again.get_submodule(name).basis is again.get_submodule(lender).right


def test_the_budget_is_met_and_every_basis_is_stored_and_counted_once(llama, tmp_path):
    folder, _ = llama
    for method in METHODS:
        model = small(folder, method)
        table = summary(model)
        targeted = sum(site.out_features * site.in_features for site in match_sites(dense(folder)))
        kept = targeted - table.dense_parameters + table.parameters
        assert 0.42 * targeted < kept <= 0.5 * targeted
        assert table.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
        model.save_pretrained(tmp_path / method)
        with safe_open(tmp_path / method / "model.safetensors", "pt") as file:
            stored = {key: file.get_slice(key).get_shape() for key in file.keys()}
        assert sum(torch.Size(shape).numel() for shape in stored.values()) == table.parameters
        assert set(stored) == set(model.state_dict())


def test_full_rank_gives_back_the_dense_model(llama):
    folder, inputs = llama
    for method in METHODS:
        model = small(folder, method, rank_pattern={"down_proj": "dense", ".*_proj": 64})
        torch.testing.assert_close(logits(model, inputs), logits(dense(folder), inputs), rtol=1e-4, atol=1e-5)


def test_keys_and_values_that_alone_break_even_become_smaller_with_the_queries(llama):
    folder, _ = llama
    model = dense(folder)
    options = {"param_ratio": None, "rank": 24, "target_modules": QKV}
    alone = make_plan(model, config_for(folder, "whitened_svd", **options))
    together = make_plan(model, config_for(folder, JOINT, **options))
    layer = "model.layers.0.self_attn."
    assert {layer + "k_proj", layer + "v_proj"} < set(alone.dense)
    assert together.members.keys() > {layer + "k_proj", layer + "v_proj"}
    assert not together.dense


@pytest.mark.parametrize("allocation", ["knapsack", "uniform", "energy", {"name": "lems", "search_samples": 1}])
@pytest.mark.parametrize("budget", [{}, {"param_ratio": None, "target_bytes": 260_000}])
def test_allocators_work_on_groups_unchanged(llama, tmp_path, allocation, budget):
    folder, inputs = llama
    options = {"allocation": allocation, **budget}
    config = LowRankConfig(**{"method": BOTH, "param_ratio": 0.5, "rank_multiple": 1, **options})
    config.calibration = [inputs()]
    model = factorize(dense(folder), config)
    streamed = AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config)
    assert str(summary(model)) == str(summary(streamed))
    assert lenders(model)
    model.save_pretrained(tmp_path)
    if "target_bytes" in budget:
        size = (tmp_path / "model.safetensors").stat().st_size
        assert 0.9 * 260_000 < size <= 260_000


def test_the_error_of_a_group_is_at_least_that_of_its_parts_at_equal_rank(llama):
    folder, _ = llama
    options = {"param_ratio": None, "rank_pattern": {"q_proj": 6, "k_proj": 6, "v_proj": 6}, "energy": 1.0}
    options["target_modules"] = QKV
    original = dense(folder)
    statistics = hf_lowrank.Statistics.load(folder / "statistics.safetensors")
    errors = []
    for method in ("whitened_svd", JOINT):
        model = factorize(dense(folder), config_for(folder, method, **options))
        name = "model.layers.0.self_attn."
        gram = statistics.get(name + "q_proj", ["input_gram"])["input_gram"]
        error = 0
        for leaf in QKV:
            left = original.get_submodule(name + leaf).weight - model.get_submodule(name + leaf).dense_weight()
            error += ((left.detach().double() @ gram) * left).sum().item()
        errors.append(error)
    assert 0 < errors[0] <= errors[1]


def test_copies_casts_and_dense_models(llama, tmp_path):
    folder, inputs = llama
    model = small(folder, "both")
    before = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)
    originals = {id(module) for module in model.modules()}
    assert not any(id(twin.get_submodule(name).basis) in originals for name in lenders(twin))
    twin = twin.to(torch.bfloat16)
    assert logits(twin, inputs).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in twin.parameters())
    to_dense(model)
    assert not factorized(model)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


def test_a_training_step_moves_every_basis_once_and_is_saved(llama, tmp_path):
    folder, inputs = llama
    model = small(folder, "both").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = inputs()
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "right" in name)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "qwen2", "mixtral", "phi3"])
def test_other_architectures_share_between_layers(name, tmp_path):
    model, inputs = tiny_model(name)
    model.save_pretrained(tmp_path / "dense")
    collect_statistics(model, [inputs()], method=LAYERS).save(tmp_path / "statistics.safetensors")
    config = config_for(tmp_path, LAYERS, rank_multiple=8)
    streamed, info = type(model).from_pretrained(tmp_path / "dense", lowrank_config=config, output_loading_info=True)
    assert info == CLEAN
    in_memory = factorize(model, config)
    assert lenders(in_memory)
    assert torch.equal(logits(in_memory, inputs), logits(streamed, inputs))
    streamed.save_pretrained(tmp_path / "small")
    again, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(streamed, inputs))


def test_the_base_model_and_the_model_with_a_head_find_their_bases(llama, tmp_path):
    folder, inputs = llama
    model = small(folder, "both")
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert set(lenders(base)) == {name.removeprefix("model.") for name in lenders(model)}
    assert torch.equal(logits(base, inputs), logits(model.model, inputs))
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(base, inputs))


def test_a_trainer_trains_saves_and_resumes_bases(llama, tmp_path):
    folder, inputs = llama
    data = [{"input_ids": row, "labels": row} for row in inputs()["input_ids"]] * 2
    options = {"max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_steps": 1}
    models = [small(folder, "both") for _ in range(2)]
    straight = Trainer(models[0], TrainingArguments(tmp_path / "out", **options), train_dataset=data)
    straight.train()
    resumed = Trainer(models[1], TrainingArguments(tmp_path / "out", **options), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    start = logits(small(folder, "both"), inputs)
    assert not torch.allclose(logits(models[0], inputs), start, atol=1e-4)
    torch.testing.assert_close(logits(models[1], inputs), logits(models[0], inputs))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(again, inputs), logits(models[0].eval(), inputs))


def test_an_automatic_device_map(llama):
    folder, inputs = llama
    config = config_for(folder, BOTH)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config, device_map="auto")
    assert torch.equal(logits(model, inputs), logits(small(folder, "both"), inputs))


def test_layers_on_disk_find_a_basis_in_memory_and_the_other_way_round(llama, tmp_path):
    folder, inputs = llama
    model = small(folder, "layers")
    model.save_pretrained(tmp_path / "small")
    for here, there in ((0, 1), (1, 0)):
        device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        device_map.update({f"model.layers.{here}": "cpu", f"model.layers.{there}": "disk"})
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", device_map=device_map, offload_folder=tmp_path / f"reloaded{here}"
        )
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        streamed = AutoModelForCausalLM.from_pretrained(
            folder / "dense",
            lowrank_config=config_for(folder, LAYERS),
            device_map=device_map,
            offload_folder=tmp_path / f"streamed{here}",
        )
        assert torch.equal(logits(streamed, inputs), logits(model, inputs))


def test_adapters_see_the_basis_and_serve_every_layer_of_the_group(llama):
    peft = pytest.importorskip("peft")
    folder, inputs = llama
    model = small(folder, "joint")
    before = logits(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["right", "left"], r=2, lora_alpha=4))
    names = [
        name for name, module in adapted.named_modules() if type(module).__name__ == "Linear" and "layers.0" in name
    ]
    assert any(name.endswith("q_proj.right") for name in names)
    assert not any(name.endswith("k_proj.right") for name in names)
    assert torch.equal(logits(adapted, inputs), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    changed = logits(adapted, inputs)
    assert not torch.allclose(changed, before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), changed, rtol=1e-4, atol=1e-5)


def test_a_lender_that_was_taken_out_is_never_lost_silently(llama, tmp_path):
    folder, _ = llama
    model = small(folder, "layers")
    model.model.layers = model.model.layers[1:]
    with pytest.raises(hf_lowrank.CheckpointError, match="borrows its basis from a layer that is not in this model"):
        model.save_pretrained(tmp_path)
    to_dense(model).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": "model.layers.7.self_attn.q_proj"}, r"k_proj borrows the basis of 'model\.layers\.7"),
        ({"basis": "model.norm"}, "cannot borrow the basis of LlamaRMSNorm"),
        ({"basis": "model.layers.0.self_attn.v_proj"}, "cannot borrow the basis of SharedBasisLinear"),
        ({"basis": "model.layers.0.self_attn.k_proj"}, "cannot borrow the basis of SharedBasisLinear"),
        ({"basis": "model.layers.0.mlp.down_proj"}, "cannot borrow the basis of"),
        ({"basis": 3}, "`basis` is the name of a module"),
        ({"rank": 5}, "cannot borrow the basis of a layer of"),
        ({"format": "low_rank"}, r"only the formats \['dense_sparse', 'shared_basis'\] have one"),
    ],
)
def test_a_damaged_config_is_a_checkpoint_error(llama, tmp_path, change, message):
    folder, _ = llama
    small(folder, "joint").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["modules"]["model.layers.0.self_attn.k_proj"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(hf_lowrank.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_basis_is_never_random(llama, tmp_path):
    folder, _ = llama
    small(folder, "joint").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.self_attn.q_proj.right.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        hf_lowrank.CheckpointError, match=r"do not agree on model\.layers\.1\.self_attn\.q_proj\.right"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_group_that_only_some_blocks_have_is_one():
    model, _ = tiny_model("llama")
    del model.model.layers[0].mlp.up_proj
    method = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [FEED, [*QKV, "down_proj"]]}
    plan = make_plan(model, LowRankConfig(method=method))
    members = {name.removeprefix("model.layers."): len(site.members) for name, site in plan.sites.items()}
    assert members["1.mlp.gate_proj"] == 2
    assert members["0.mlp.gate_proj"] == members["0.mlp.down_proj"] == 1
    assert members["0.self_attn.q_proj"] == 3
    # What is left out takes the group apart; it is no mistake.
    plan = make_plan(model, LowRankConfig(method=method, target_modules=["gate_proj"]))
    assert {len(site.members) for site in plan.sites.values()} == {1}


def test_a_group_is_made_of_what_is_targeted(llama):
    folder, _ = llama
    model = small(folder, "joint", exclude_modules=["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj"])
    attention = "model.layers.{}.self_attn.{}"
    assert lenders(model)[attention.format(0, "v_proj")] == attention.format(0, "k_proj")
    assert lenders(model)[attention.format(1, "v_proj")] == attention.format(1, "q_proj")
    assert isinstance(model.get_submodule(attention.format(1, "k_proj")), nn.Linear)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": {**JOINT, "joint_groups": [["q_proj", "query"]]}},
            TargetError,
            "'query', which matches no linear",
        ),
        ({"method": {**JOINT, "joint_groups": [QKV, ["q_proj", "o_proj"]]}}, ConfigError, "q_proj 2 times"),
        (
            {"method": {**JOINT, "joint_groups": [FEED, ["q_proj", "down_proj"]]}},
            TargetError,
            r"\['q_proj', 'down_proj'\] together, of which no two .* \(model.layers.0.self_attn.q_proj, model",
        ),
        ({"method": {**BOTH, "joint_groups": [["q_proj", "up_proj"]]}}, TargetError, "no two stand"),
        ({"method": {**JOINT, "joint_groups": [["up_proj", "down_proj"]]}}, TargetError, "cannot share a basis"),
        ({"method": JOINT, "rank_pattern": {"q_proj": 8, "k_proj": 9}}, ConfigError, r"different ranks, \[8, 9\]"),
        (
            {"method": JOINT, "param_ratio": None, "target_bytes": 10**6, "allocation": TIMED},
            ConfigError,
            "counts what is stored",
        ),
        ({"method": JOINT, "allocation": TIMED}, ConfigError, "counts time, and .*q_proj shares a basis with others"),
        ({"method": LAYERS, "refine": "blocks"}, ConfigError, "ties blocks to each other; use share_layers=1"),
        (
            {"method": JOINT, "format": "pivoted"},
            ConfigError,
            r"`format`='pivoted' cannot hold .*\['shared_basis', 'dense_sparse'\]",
        ),
    ],
)
def test_what_cannot_be_grouped_is_refused(llama, options, error, message):
    folder, _ = llama
    model = dense(folder)
    with pytest.raises(error, match=message):
        factorize(model, config_for(folder, **options))
    assert not factorized(model)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config_for(folder, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_groups_are_refined_block_by_block(llama, dtype):
    folder, inputs = llama
    errors, target = [], logits(dense(folder).to(dtype), inputs)
    for refine in (None, {"name": "blocks", "epochs": 20}):
        config = LowRankConfig(method=JOINT, param_ratio=0.4, rank_multiple=1, refine=refine)
        model = factorize(dense(folder).to(dtype), config, calibration=[inputs()])
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(
            model.get_submodule(name).basis is model.get_submodule(to).right for name, to in lenders(model).items()
        )
        errors.append((logits(model, inputs) - target).float().norm())
    assert errors[1] < errors[0]


def test_a_weight_that_is_not_finite_is_named_with_its_group(llama, tmp_path):
    folder, _ = llama
    model = dense(folder)
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(hf_lowrank.NonFiniteError, match=r"0\.self_attn\.k_proj"):
        factorize(model, config_for(folder, JOINT))
    assert not factorized(model)
    with pytest.raises(hf_lowrank.NonFiniteError, match=r"q_proj \+ .*0\.self_attn\.k_proj \+ .*v_proj: The weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, lowrank_config=config_for(folder, JOINT))


def test_a_group_that_never_completes_is_an_error(llama, monkeypatch):
    folder, _ = llama
    convert = Factorize.convert

    def forgetful(self, input_dict, **kwargs):
        made = convert(self, dict(input_dict), **kwargs)
        for waiting in self.quantizer.arrived.values():
            waiting.pop("model.layers.1.self_attn.k_proj", None)
        return made

    monkeypatch.setattr(Factorize, "convert", forgetful)
    with pytest.raises(hf_lowrank.CheckpointError, match=r"1\.self_attn\.k_proj was not read, and 2 weights wait"):
        AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config_for(folder, JOINT))


def test_weights_wait_for_the_last_of_their_group_and_no_longer(llama, monkeypatch):
    folder, _ = llama
    waiting = []
    convert = Factorize.convert

    def watched(self, *args, **kwargs):
        made = convert(self, *args, **kwargs)
        waiting.append(sum(len(weights) for weights in self.quantizer.arrived.values()))
        return made

    monkeypatch.setattr(Factorize, "convert", watched)
    AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config_for(folder, JOINT))
    assert max(waiting) == 2
    assert waiting[-1] == 0
