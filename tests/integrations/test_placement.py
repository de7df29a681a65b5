"""Device maps, offloading, compiling, generating, training, casting: a factorized model is an ordinary model."""

import copy
import shutil
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.accelerate import compute_module_sizes

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig, LowRankLinear, LowRankQuantizer, collect_statistics, factorize
from hf_lowrank.testing import tiny_model


CONFIG = LowRankConfig(method="svd", param_ratio=0.5)
ONE_LAYER_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    for name in ("llama", "llama_tied", "mixtral"):
        model, _ = tiny_model(name)
        model.save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, lowrank_config=CONFIG)
        model.save_pretrained(folder / f"{name}-small")
    return folder


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral"])
def test_automatic_device_map(folders, name):
    model = AutoModelForCausalLM.from_pretrained(folders / name, lowrank_config=CONFIG, device_map="auto")
    expected = run(AutoModelForCausalLM.from_pretrained(folders / f"{name}-small"))
    assert torch.equal(run(model), expected)


def test_device_map_counts_factors_not_placeholders(folders, monkeypatch):
    sizes = []

    def spy(self, max_memory):
        sizes.append(compute_module_sizes(self.model, self)[0][""])
        return max_memory

    def remember(self, model, **kwargs):
        self.model = model
        build(self, model, **kwargs)

    build = LowRankQuantizer._process_model_before_weight_loading
    monkeypatch.setattr(LowRankQuantizer, "_process_model_before_weight_loading", remember)
    monkeypatch.setattr(LowRankQuantizer, "adjust_max_memory", spy)
    model = AutoModelForCausalLM.from_pretrained(folders / "llama", lowrank_config=CONFIG, device_map="auto")
    tensors = [*model.parameters(), *model.buffers()]
    assert sizes == [sum(t.numel() * t.element_size() for t in tensors)]


def test_a_small_memory_limit_offloads_only_what_does_not_fit_as_factors(folders, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(folders / "llama-small")
    needed = sum(t.numel() * t.element_size() for t in [*small.parameters(), *small.buffers()])
    largest = 3 * 4 * 64 * 96
    for limit, offloads in ((needed + largest + 20_000, False), (needed // 2 + largest, True)):
        model = AutoModelForCausalLM.from_pretrained(
            folders / "llama",
            lowrank_config=CONFIG,
            device_map="auto",
            max_memory={"cpu": limit},
            offload_folder=tmp_path / str(limit),
        )
        assert ("disk" in getattr(model, "hf_device_map", {}).values()) == offloads
        assert torch.equal(run(model), run(small))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_disk_offload_on_the_fly_and_on_reload(folders, name, tmp_path):
    expected = run(AutoModelForCausalLM.from_pretrained(folders / f"{name}-small"))
    model = AutoModelForCausalLM.from_pretrained(
        folders / name, lowrank_config=CONFIG, device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.left.weight.is_meta
    assert torch.equal(run(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)
    again = AutoModelForCausalLM.from_pretrained(
        folders / f"{name}-small", device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path / "again"
    )
    assert torch.equal(run(again), expected)
    with pytest.raises(hf_lowrank.LowRankError, match="on disk or on the meta device"):
        hf_lowrank.to_dense(model)


@pytest.mark.parametrize("method", ["sparse_low_rank", "dsformer"])
def test_layers_with_tensors_of_their_own_are_offloaded(method, tmp_path):
    model, inputs = tiny_model("qwen2")
    factorize(model, LowRankConfig(method=method))
    with torch.no_grad():
        expected = model(**inputs()).logits
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        assert torch.equal(model(**inputs()).logits, expected)


def test_calibrated_load_with_offload(folders, tmp_path):
    config = LowRankConfig(param_ratio=0.5, calibration=[{"input_ids": torch.arange(3, 40)[None]}])
    expected = run(AutoModelForCausalLM.from_pretrained(folders / "llama", lowrank_config=config))
    model = AutoModelForCausalLM.from_pretrained(
        folders / "llama", lowrank_config=config, device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_calibrating_block_by_block_with_offload(folders, name, tmp_path, monkeypatch):
    batches = [{"input_ids": torch.arange(3, 40)[None]}, {"input_ids": torch.arange(40, 77)[None]}]
    whole = Calibration(batches)
    parts = Calibration(batches, folder=tmp_path / "parts")
    expected = collect_statistics(AutoModelForCausalLM.from_pretrained(folders / name), whole)
    model = AutoModelForCausalLM.from_pretrained(
        folders / name, device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    found = collect_statistics(model, parts)
    statistics = ["input_gram", "gradient_gram"]
    for module in expected.leaders:
        a, b = (s.get(module, statistics) for s in (found, expected))
        assert all(torch.equal(a[key], b[key]) for key in statistics)
    # Where weights are is no part of what is collected: the run without offload finds it finished.
    dense = AutoModelForCausalLM.from_pretrained(folders / name)
    monkeypatch.setattr(type(dense), "forward", lambda *args, **kwargs: 1 / 0)
    assert collect_statistics(dense, parts).leaders == found.leaders


def test_calibrated_load_block_by_block_with_offload(folders, tmp_path):
    batches = [{"input_ids": torch.arange(3, 40)[None]}]
    config = LowRankConfig(param_ratio=0.5, calibration=batches)
    expected = run(AutoModelForCausalLM.from_pretrained(folders / "llama", lowrank_config=config))
    config = LowRankConfig(param_ratio=0.5, calibration=Calibration(batches, folder=tmp_path / "parts"))
    model = AutoModelForCausalLM.from_pretrained(
        folders / "llama", lowrank_config=config, device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(run(model), expected)


def test_a_failed_load_leaves_no_file_behind(folders, tmp_path):
    state = load_file(folders / "llama" / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folders / "llama" / "config.json", tmp_path)
    offload = tmp_path / "offload"
    offload.mkdir()
    (offload / "mine.txt").touch()
    with pytest.raises(hf_lowrank.NonFiniteError, match="layers.1.self_attn.v_proj"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, lowrank_config=CONFIG, device_map=ONE_LAYER_ON_DISK, offload_folder=offload
        )
    assert [path.name for path in offload.iterdir()] == ["mine.txt"]


def test_disk_without_a_folder_is_refused_before_loading(folders):
    with pytest.raises(hf_lowrank.ResourceError, match="give `offload_folder`"):
        AutoModelForCausalLM.from_pretrained(folders / "llama", lowrank_config=CONFIG, device_map=ONE_LAYER_ON_DISK)


def test_a_full_disk_is_refused_before_loading(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(hf_lowrank.ResourceError, match="are needed; free some space or offload elsewhere"):
        AutoModelForCausalLM.from_pretrained(
            folders / "llama", lowrank_config=CONFIG, device_map=ONE_LAYER_ON_DISK, offload_folder=tmp_path
        )


@pytest.mark.parametrize("name", ["llama-small", "mixtral-small"])
def test_compile(folders, name):
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled), run(model))


def test_compile_of_a_model_that_looks_at_weights():
    model, inputs = tiny_model("t5")
    factorize(model, CONFIG)
    with torch.no_grad():
        expected = model(**inputs()).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs()).logits, expected)


def test_generation_with_a_static_cache(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-small")
    ids = torch.arange(3, 9)[None]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, cache_implementation="static", **kwargs))


def test_cast(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-small")
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert run(model).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama_tied", lowrank_config=CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = AutoModelForCausalLM.from_pretrained(folders / "llama_tied-small")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with pytest.raises(hf_lowrank.TargetError, match="whose weight is tied to another module"):
        config = LowRankConfig(method="svd", target_modules=["lm_head"])
        AutoModelForCausalLM.from_pretrained(folders / "llama_tied", lowrank_config=config)


def test_an_untied_head_on_request(folders, tmp_path):
    config = LowRankConfig(method="svd", param_ratio=0.5, target_modules=["lm_head", "q_proj"])
    model = AutoModelForCausalLM.from_pretrained(folders / "llama", lowrank_config=config)
    assert isinstance(model.lm_head, LowRankLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)), run(model))


@pytest.mark.parametrize("route", ["load", "memory"])
def test_trainer_trains_checkpoints_and_resumes(folders, tmp_path, route):
    def make():
        if route == "load":
            return AutoModelForCausalLM.from_pretrained(folders / "llama-small")
        return factorize(AutoModelForCausalLM.from_pretrained(folders / "llama"), copy.deepcopy(CONFIG))

    def train(folder, steps, resume=None):
        ids = torch.randint(3, 96, (24, 12), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "labels": row} for row in ids]
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=3,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="constant",
        )  # fmt: skip
        model = make()
        before = model.model.layers[0].self_attn.q_proj.left.weight.detach().clone()
        trainer = Trainer(model, arguments, train_dataset=data)
        result = trainer.train(resume_from_checkpoint=resume)
        return model, before, result

    model, before, result = train(tmp_path / "whole", 6)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.left.weight, before)
    losses = run(model)
    resumed, _, _ = train(tmp_path / "resumed", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(run(resumed), losses), "kill and resume end in the same bits"
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(run(checkpoint), losses)


def test_changed_ranks_are_saved_as_they_are(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-small")
    layer = model.model.layers[0].self_attn.q_proj
    layer.left.weight = torch.nn.Parameter(layer.left.weight[:, :3].clone())
    layer.right.weight = torch.nn.Parameter(layer.right.weight[:3].clone())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.rank == 3
    assert torch.equal(run(again), run(model))


def test_dequantize_is_to_dense(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-small")
    expected = run(model)
    model.dequantize()
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


def test_quantization_config_keyword(folders):
    by_keyword = AutoModelForCausalLM.from_pretrained(folders / "llama", quantization_config=CONFIG)
    by_dict = AutoModelForCausalLM.from_pretrained(
        folders / "llama", lowrank_config={"method": "svd", "param_ratio": 0.5}
    )
    expected = run(AutoModelForCausalLM.from_pretrained(folders / "llama-small"))
    assert torch.equal(run(by_keyword), expected)
    assert torch.equal(run(by_dict), expected)
    by_from_dict = AutoModelForCausalLM.from_pretrained(
        folders / "llama", quantization_config={"quant_method": "lowrank", "method": "svd", "param_ratio": 0.5}
    )
    assert torch.equal(run(by_from_dict), expected)
