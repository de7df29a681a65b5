"""One load factorizes and quantizes; what is saved loads again, bit for bit, and takes the bytes that are told."""

import copy
import json

import peft
import pytest
import torch
from processes import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

import hf_lowrank
from hf_lowrank import ConfigError, LowRankConfig, RankError, ResourceError, factorize, residual_adapter, summary
from hf_lowrank.evaluation import size_of
from hf_lowrank.formats import FORMATS, is_packed
from hf_lowrank.integrations.streaming import Factorize
from hf_lowrank.testing import tiny_model


torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # noqa: E402
from transformers import TorchAoConfig  # noqa: E402


# Four bits in a tensor that torchao can write to files; it stores each in a byte.
INT4 = torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(16))
KINDS = {"int8": torchao.Int8WeightOnlyConfig(version=2), "int4": INT4}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def recipe(**options):
    return LowRankConfig(**{"method": "svd", "rank": 16, "rank_pattern": {"o_proj": "dense"}, **options})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    for name in ("llama", "llama_tied", "gpt2", "mixtral"):
        tiny_model(name)[0].save_pretrained(folder / name)
    return folder


def load(where, *quantization, **options):
    if quantization:
        options["quantization_config"] = TorchAoConfig(*quantization)
    return AutoModelForCausalLM.from_pretrained(where, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 20)[None]).logits


def payload(folder):
    """Bytes of the tensors in the files of `folder`, and their names."""
    found = load_file(folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in found.values()), set(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS.names())
def test_one_load_then_saved_and_reloaded(folders, tmp_path, format, kind):
    config = recipe(format=format)
    model = load(folders / "llama", KINDS[kind], lowrank_config=config)
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    packed = {name for name in linears if is_packed(model.get_submodule(name).weight)}
    assert packed == linears - {"lm_head"}
    assert f"{Q.replace('q_proj', 'o_proj')}" in packed, "what stays dense is quantized too"
    # By hand, one after the other.
    expected = factorize(AutoModelForCausalLM.from_pretrained(folders / "llama"), config)
    torchao.quantize_(expected, KINDS[kind], lambda module, name: name in packed)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    assert str(summary(again)) == str(summary(model))
    again.save_pretrained(tmp_path / "two")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert (tmp_path / "two/config.json").read_text() == (tmp_path / "one/config.json").read_text()


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_other_layouts(folders, tmp_path, name):
    model = load(folders / name, KINDS["int8"], lowrank_config=recipe(rank_pattern={}))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_saved_factors_are_quantized_when_they_load(folders, tmp_path):
    factors = load(folders / "llama", lowrank_config=recipe())
    factors.save_pretrained(tmp_path / "factors")
    at_once = load(folders / "llama", KINDS["int8"], lowrank_config=recipe())
    model = load(tmp_path / "factors", KINDS["int8"])
    assert torch.equal(logits(model), logits(at_once))
    with pytest.warns(UserWarning, match="`lowrank_config` is ignored, and `quantization_config` quantizes"):
        same = load(tmp_path / "factors", KINDS["int8"], lowrank_config=recipe(rank=8))
    assert torch.equal(logits(same), logits(at_once))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(at_once))
    config = json.loads((tmp_path / "quantized/config.json").read_text())["quantization_config"]
    assert config["recipe"]["rank"] == 16
    assert config["inner"]["quant_method"] == "torchao"
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        same = load(tmp_path / "quantized", INT4)
    assert torch.equal(logits(same), logits(at_once))
    assert torch.equal(logits(load(tmp_path / "factors")), logits(factors)), "nothing is quantized unasked"


@pytest.mark.parametrize("method", ["svd", "kfac_svd"])
def test_ranks_are_multiples_of_the_groups(folders, method):
    """Where there is no room for such a rank, a weight stays dense, rather than be left unquantized."""
    config = LowRankConfig(method=method, param_ratio=0.7, calibration=[{"input_ids": torch.arange(3, 40)[None]}])
    model = load(folders / "llama", INT4, lowrank_config=config)
    ranks = {row.rank for row in summary(model).rows}
    assert ranks
    assert all(rank % 16 == 0 for rank in ranks)
    assert all(is_packed(p) for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)


def test_the_default_method_measures_unquantized_factors(folders, tmp_path):
    config = LowRankConfig(param_ratio=0.6, calibration=[{"input_ids": torch.arange(3, 40)[None]}])
    plain = load(folders / "llama", lowrank_config=config)
    model = load(folders / "llama", KINDS["int8"], lowrank_config=config)
    assert [(row.format, row.rank) for row in summary(model).rows] == [
        (row.format, row.rank) for row in summary(plain).rows
    ]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0.02)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_each_weight_is_packed_before_the_next_is_factorized(folders, monkeypatch):
    """The model never stands in memory with all its factors unquantized."""
    seen = []

    def spy(self, model, unit, weight, dtype):
        found = [p for name, p in model.named_parameters() if name.endswith(("left.weight", "right.weight"))]
        seen.append((sum(not p.is_meta and is_packed(p) for p in found), sum(not p.is_meta for p in found)))
        return original(self, model, unit, weight, dtype)

    original = Factorize._factorize
    monkeypatch.setattr(Factorize, "_factorize", spy)
    load(folders / "llama", KINDS["int8"], lowrank_config=recipe(format="low_rank"))
    assert seen == [(2 * i, 2 * i) for i in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_files(folders, tmp_path, kind):
    model = load(folders / "llama", KINDS[kind], lowrank_config=recipe(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    size, names = payload(tmp_path)
    report, measured = summary(model), size_of(model)
    assert report.bytes == measured.bytes == size
    dense = AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.bfloat16)
    numbers = sum(p.numel() for p in dense.parameters())
    assert report.dense_parameters == numbers
    unquantized = summary(load(folders / "llama", lowrank_config=recipe(), dtype=torch.bfloat16))
    assert report.parameters == measured.parameters == unquantized.parameters
    assert [row.parameters for row in report.rows] == [row.parameters for row in unquantized.rows]
    assert sum(row.bytes for row in report.rows) < 0.6 * sum(row.bytes for row in unquantized.rows)
    assert f"{Q}.left._weight_qdata" in names


def test_the_card_says_how_factors_are_quantized(folders):
    text = hf_lowrank.model_card(load(folders / "llama", KINDS["int8"], lowrank_config=recipe()), "me/small").text
    assert "- factors quantized by: `torchao`, `Int8WeightOnlyConfig`" in text
    assert "pip install hf-lowrank torchao\n" in text
    plain = hf_lowrank.model_card(load(folders / "llama", lowrank_config=recipe()), "me/small").text
    assert "pip install hf-lowrank\n" in plain
    assert "quantized by" not in plain


def test_automatic_device_map_counts_packed_factors(folders):
    model = load(folders / "llama", KINDS["int8"], lowrank_config=recipe(), device_map="auto")
    assert torch.equal(logits(model), logits(load(folders / "llama", KINDS["int8"], lowrank_config=recipe())))


def test_a_process_that_never_imports_the_package(folders, tmp_path):
    model = load(folders / "llama", KINDS["int8"], lowrank_config=recipe())
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    done = run(
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "found = model(input_ids=torch.arange(3, 20)[None]).logits\n"
        f"assert torch.equal(found, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "back", [hf_lowrank.to_dense, lambda model: model.dequantize()], ids=["to_dense", "dequantize"]
)
@pytest.mark.parametrize("format", FORMATS.names())
def test_back_to_an_ordinary_model(folders, tmp_path, format, back):
    model = load(folders / "llama", KINDS["int8"], lowrank_config=recipe(format=format))
    before = logits(model)
    back(model)
    assert not any(is_packed(p) for p in model.parameters())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_residual_of_quantized_factors(folders, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(folders / "llama")
    base = load(folders / "llama", INT4, lowrank_config=recipe(rank_pattern={}))
    base.save_pretrained(tmp_path / "base")
    lost = (logits(base) - logits(dense)).norm()
    model = residual_adapter(base, dense, rank=16)
    assert (logits(model) - logits(dense)).norm() < 0.6 * lost
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_opaque_int4_packs_to_half_a_byte_but_only_in_memory(folders, tmp_path):
    """Its layout depends on the processor, so that torchao writes it to no file."""
    kind = PrototypeInt4WeightOnlyConfig(group_size=32)
    model = load(folders / "llama", kind, lowrank_config=recipe(rank=32, format="low_rank"), dtype=torch.bfloat16)
    row = next(row for row in summary(model).rows if row.name == UP)
    assert row.bytes == row.parameters / 2 + row.parameters / 32 * 4
    with pytest.raises(ConfigError, match=r"cannot be written to files: .*Int4OpaqueTensor.*Int8WeightOnlyConfig"):
        model.save_pretrained(tmp_path / "no")
    assert not list(tmp_path.glob("no/*.safetensors"))
    # What cannot be unpacked is what it makes of the identity.
    layer = model.get_submodule(UP)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(x @ layer.dense_weight().T, layer(x), rtol=0.05, atol=0.05)


def test_experts_stay_and_that_is_said(folders, tmp_path, caplog):
    model = load(folders / "mixtral", KINDS["int8"], lowrank_config=recipe(rank_pattern={}))
    assert "8 matrices of factors, such as model.layers.0.mlp.experts" in caplog.text
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_quantized_in_memory(folders, tmp_path):
    model = factorize(AutoModelForCausalLM.from_pretrained(folders / "llama"), recipe())
    model.save_pretrained(tmp_path / "factors")
    quantized = copy.deepcopy(model)
    torchao.quantize_(quantized, KINDS["int8"], lambda module, name: name.endswith((".left", ".right", "o_proj")))
    with pytest.raises(
        ConfigError, match=r"layers.0.*\.weight was quantized in memory.*from_pretrained\(folder, quan"
    ):
        quantized.save_pretrained(tmp_path / "no")
    assert torch.equal(logits(load(tmp_path / "factors", KINDS["int8"])), logits(quantized)), "the cure works"


def test_a_budget_in_bytes_is_that_of_unquantized_factors(folders, caplog):
    config = LowRankConfig(method="svd", target_bytes=200_000)
    plain = load(folders / "llama", lowrank_config=config)
    model = load(folders / "llama", KINDS["int8"], lowrank_config=config)
    assert [row.rank for row in summary(model).rows] == [row.rank for row in summary(plain).rows]
    assert "`target_bytes`=200000 counts the factors before they are quantized" in caplog.text


def test_refusals(folders, tmp_path):
    where = folders / "llama"
    load(where, KINDS["int8"]).save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"quantized with 'torchao'.*`lowrank_config`, and add.*residual_adapter"):
        load(tmp_path / "int8", lowrank_config=recipe())
    with pytest.raises(ConfigError, match="quantized with 'torchao'"):
        load(tmp_path / "int8", KINDS["int8"], lowrank_config=recipe())
    for options in ({"rank": 24}, {"rank_pattern": {"layers.1.mlp.down_proj": 24}}):
        with pytest.raises(
            RankError, match="rank=24 for .* must be a multiple of 16, .*`quantization_config` divides"
        ):
            load(where, INT4, lowrank_config=recipe(**options))
    load(where, lowrank_config=recipe(rank=24, format="low_rank")).save_pretrained(tmp_path / "24")
    with pytest.raises(ConfigError, match=r"left.weight of shape \(64, 24\) cannot be quantized by .*divisible"):
        load(tmp_path / "24", INT4)
    with pytest.raises(
        ConfigError, match="is for 'quanto', which does not quantize factors while they load; .*torchao"
    ):
        load(where, lowrank_config=recipe(), quantization_config=QuantoConfig())
    with pytest.raises(
        ConfigError, match="`quantization_config` must be a transformers quantization config.* not int"
    ):
        load(where, lowrank_config=recipe(), quantization_config=3)
    with pytest.raises(ConfigError, match="cannot go with a `refine` or a `method` that compares"):
        load(where, KINDS["int8"], lowrank_config=recipe(refine="blocks"))
    with pytest.raises(ConfigError, match="`config` asks for quantized factors.*load"):
        factorize(
            tiny_model("llama")[0], load(where, KINDS["int8"], lowrank_config=recipe()).config.quantization_config
        )
    on_disk = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "": "cpu"}
    with pytest.raises(ResourceError, match="where quantized ones cannot be kept"):
        load(where, KINDS["int8"], lowrank_config=recipe(), device_map=on_disk, offload_folder=tmp_path / "disk")


@pytest.mark.parametrize("format", FORMATS.names())
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folders, tmp_path, bits, format):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    kind = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = load(folders / "llama", lowrank_config=recipe(format=format), quantization_config=kind)
    assert (
        "bitsandbytes"
        in type(model.get_submodule(Q).get_submodule("basis" if format == "pivoted" else "left")).__module__
    )
    plain = load(folders / "llama", lowrank_config=recipe(format=format))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0.2)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert size_of(model).bytes == payload(tmp_path / "saved")[0]
    assert [(row.rank, row.parameters) for row in summary(again).rows] == [
        (row.rank, row.parameters) for row in summary(plain).rows
    ]
    plain.save_pretrained(tmp_path / "factors")
    assert torch.equal(logits(load(tmp_path / "factors", quantization_config=kind)), logits(model))
    hf_lowrank.to_dense(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0.02)
