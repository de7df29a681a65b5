"""Whatever the user calls calibration data becomes the right batches, and the record says what it was."""

import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from words import TEXTS, word_tokenizer

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig, collect_statistics
from hf_lowrank.integrations import self_samples
from hf_lowrank.testing import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny language model with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama")[0].save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def provenance(folder, calibration):
    config = LowRankConfig(param_ratio=0.5, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(folder, lowrank_config=config)
    return model.config.quantization_config.to_dict()["recipe"]["calibration"]


def test_texts_files_and_data_sets_are_the_same_tokens(llama, tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(lines)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    grams = {}
    for name, data in (
        ("list", TEXTS),
        ("jsonl", str(tmp_path / "texts.jsonl")),
        ("set", str(tmp_path / "set")),
        ("txt", str(tmp_path / "texts.txt")),
    ):
        calibration = Calibration(data, samples=5, length=16, batch_size=2)
        statistics = collect_statistics(AutoModelForCausalLM.from_pretrained(llama), calibration)
        assert statistics.provenance["tokens"] == 5 * 16
        grams[name] = statistics.get("model.layers.1.mlp.down_proj", ["input_gram"])["input_gram"]
    assert all(torch.equal(gram, grams["list"]) for gram in grams.values())


def test_the_record_says_where_it_came_from(llama, tmp_path):
    record = provenance(llama, Calibration(TEXTS, samples=5, length=16))
    assert record["data"] == "40 texts"
    assert record["tokens"] == 80
    assert len(record["sha256"]) == 64
    record = provenance(llama, Calibration(samples=3, length=8))
    assert record == {"data": "self", "samples": 3, "length": 8, "temperature": 1.0, "seed": 0, "tokens": 24}


def test_a_data_set_is_recorded_by_its_whole_name(llama, monkeypatch):
    monkeypatch.setattr("hf_lowrank.integrations.calibration.read_texts", lambda *args: TEXTS)
    assert provenance(llama, Calibration("owner/texts:subset", samples=5, length=16))["data"] == "owner/texts:subset"


@pytest.mark.parametrize("name", hf_lowrank.METHODS.names())
def test_every_method_from_texts_to_a_reloaded_checkpoint(llama, tmp_path, name):
    method = hf_lowrank.METHODS[name]()
    calibration = Calibration(TEXTS, samples=5, length=16, batch_size=2) if method.statistics else None
    # At rank 1, which most rows of `hybrid` have by default, kernels sum in an order that depends on the address of
    # the weight.
    chosen = {"name": name, "lower_rank": 2} if name == "hybrid" else name
    config = LowRankConfig(method=chosen, param_ratio=0.5, rank_multiple=2, calibration=calibration)
    if method.initialises:
        with pytest.raises(hf_lowrank.ConfigError, match=f"`method`='{name}' starts from scratch"):
            AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)
        return
    if not all(hf_lowrank.STATISTICS[statistic].collected for statistic in method.statistics):
        with pytest.raises(hf_lowrank.CalibrationError, match=f"`method`='{name}'.* which no pass over data collects"):
            AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)
        return
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)
    recipe = model.config.quantization_config.to_dict()["recipe"]
    assert recipe["method"] == chosen
    if method.statistics:
        assert recipe["calibration"]["tokens"] == 80
    rows = hf_lowrank.summary(model).rows
    assert sum(row.parameters for row in rows) < 0.5 * sum(row.dense_parameters for row in rows)
    assert all(0 < row.relative_error < 1 for row in rows)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
        in_memory = AutoModelForCausalLM.from_pretrained(llama)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
        hf_lowrank.factorize(in_memory, config, tokenizer=tokenizer)
        torch.testing.assert_close(in_memory(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_dataloader_and_a_generator(llama):
    ids = torch.randint(3, 90, (6, 9))
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    assert provenance(llama, loader)["tokens"] == 54
    model = AutoModelForCausalLM.from_pretrained(llama)
    statistics = collect_statistics(model, ({"input_ids": row[None]} for row in ids))
    assert statistics.provenance["tokens"] == 54


def test_saved_statistics_give_the_same_factors(llama, tmp_path):
    batches = [{"input_ids": torch.randint(3, 90, (2, 30))}]
    direct = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=batches))
    path = tmp_path / "kept.safetensors"
    collect_statistics(AutoModelForCausalLM.from_pretrained(llama), batches).save(path)
    for kept in (path, str(path), hf_lowrank.Statistics.load(path)):
        model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=kept))
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in direct.state_dict().items())


def test_a_wrong_column_is_named(llama, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"body": "w1 w2"}\n')
    config = LowRankConfig(calibration=str(tmp_path / "texts.jsonl"))
    with pytest.raises(hf_lowrank.CalibrationError, match=r"has no column 'text'; its columns are \['body'\]"):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)


def test_encoders_read_one_text_a_sample_with_special_tokens(tmp_path):
    model, _ = tiny_model("bert")
    texts = ["w3 w4 w5", "w6 w7 w8 w9 w10", "w11"]
    statistics = collect_statistics(model, texts, word_tokenizer())
    assert statistics.provenance["tokens"] == 9


def test_text_for_an_encoder_decoder_is_refused(tmp_path):
    model, _ = tiny_model("t5")
    with pytest.raises(hf_lowrank.CalibrationError, match="needs inputs for its decoder too"):
        collect_statistics(model, ["some text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "`samples`=0 of Calibration"),
        ({"temperature": 0}, "`temperature`=0 of Calibration"),
        ({"temperature": "1"}, "`temperature`='1' of Calibration must be a number above 0"),
        ({"data": TEXTS, "sampled": 1.0}, r"`sampled`=1.0 of Calibration must be a number in \[0, 1\)"),
        ({"data": TEXTS, "samples": 4, "sampled": 0.1}, "splits 4 sequences .* leaves nothing to one of them"),
        ({"sampled": 0.5}, "`sampled`=0.5 of Calibration .* give text"),
    ],
)
def test_sizes_are_checked(options, message):
    with pytest.raises(hf_lowrank.ConfigError, match=message):
        Calibration(**options)


def test_text_and_samples_are_each_what_they_are_alone(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    found = collect_statistics(model, Calibration(TEXTS, samples=7, length=8, batch_size=2, sampled=0.4))
    alone = [
        collect_statistics(model, Calibration(data, samples=samples, length=8, batch_size=2))
        for data, samples in ((TEXTS, 4), ("self", 3))
    ]
    for name in found.leaders:
        grams = [each.get(name, ["input_gram"])["input_gram"].double() for each in (found, *alone)]
        torch.testing.assert_close(grams[0], grams[1] + grams[2], rtol=1e-5, atol=1e-6)
    assert found.provenance["tokens"] == 7 * 8
    expected = {"data": "40 texts", "samples": 7, "sampled": 0.4, "temperature": 1.0, "seed": 0}
    assert expected.items() <= found.provenance.items()
    assert found.provenance["sha256"] == alone[0].provenance["sha256"]


def test_the_card_names_both_sources(llama, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS))
    asked = Calibration(str(path), samples=7, length=8, sampled=0.4)
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=asked))
    text = hf_lowrank.model_card(model).text
    both = "`texts.txt` and, 0.4 of the sequences, text sampled from the model itself, 56 tokens, seed 0"
    assert f"- calibration: {both}, sha256 `" in text
    code = re.search(r"config = (LowRankConfig\(.*?^\))", text, re.DOTALL | re.MULTILINE)[1]
    again = eval(code, {"LowRankConfig": LowRankConfig, "Calibration": Calibration}).calibration
    assert again == replace(asked, data="texts.txt")


def test_half_of_the_samples_is_no_statistics_file_and_no_encoder(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    batches = [{"input_ids": torch.arange(8)[None]}]
    with pytest.raises(hf_lowrank.CalibrationError, match="`sampled`=0.5 of Calibration puts .* is list; give texts"):
        collect_statistics(model, Calibration(batches, sampled=0.5))
    with pytest.raises(hf_lowrank.CalibrationError, match="`sampled`=0.5 of Calibration samples text from a causal"):
        collect_statistics(tiny_model("bert")[0], Calibration(TEXTS, sampled=0.5))
    path = tmp_path / "statistics.safetensors"
    collect_statistics(model, TEXTS).save(path)
    with pytest.raises(hf_lowrank.CalibrationError, match="`sampled`=0.5 of Calibration puts"):
        hf_lowrank.factorize(model, LowRankConfig(), calibration=Calibration(str(path), sampled=0.5))


def test_without_the_datasets_library_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    model, _ = tiny_model("llama")
    with pytest.raises(hf_lowrank.MissingPackageError, match=r"`calibration`='some/set' .* 'hf-lowrank\[data\]'"):
        collect_statistics(model, "some/set", tokenizer=lambda *args, **kwargs: None)


def test_a_folder_gives_the_same_model_on_every_road(llama, tmp_path):
    calibration = Calibration(samples=5, length=8, batch_size=2)
    expected = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=LowRankConfig(calibration=calibration))
    state = expected.state_dict()
    kept = Calibration(samples=5, length=8, batch_size=2, folder=tmp_path / "parts")
    config = LowRankConfig(calibration=kept)
    roads = {
        "load": AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config),
        "again": AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config),
        "memory": hf_lowrank.factorize(AutoModelForCausalLM.from_pretrained(llama), config),
    }
    for road, model in roads.items():
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), road
        recipe = model.config.quantization_config.to_dict()["recipe"]
        assert recipe == expected.config.quantization_config.to_dict()["recipe"]
    assert sorted(os.listdir(tmp_path / "parts")) == ["samples", "statistics"]


def test_a_folder_with_text_and_samples_is_a_plain_pass(llama, tmp_path):
    calibration = Calibration(TEXTS, samples=6, length=8, batch_size=2, sampled=0.5)
    model = AutoModelForCausalLM.from_pretrained(llama)
    plain = hf_lowrank.factorize(AutoModelForCausalLM.from_pretrained(llama), LowRankConfig(), calibration=calibration)
    kept = hf_lowrank.factorize(model, LowRankConfig(), calibration=replace(calibration, folder=tmp_path))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name


def test_a_folder_is_sampled_into_once(llama, tmp_path, monkeypatch):
    calibration = Calibration(samples=3, length=8, folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    first = collect_statistics(model, calibration)
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    name = "model.layers.1.mlp.down_proj"
    again = collect_statistics(model, calibration).get(name, ["gradient_gram"])["gradient_gram"]
    assert torch.equal(again, first.get(name, ["gradient_gram"])["gradient_gram"])


def test_sampling_that_was_interrupted_goes_on_with_the_same_tokens(llama, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(llama)
    calibration = Calibration(samples=15, length=8, batch_size=1)
    whole = self_samples.sample_from(model, calibration, 7)
    kept = replace(calibration, folder=tmp_path)
    generate, calls = type(model).generate, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        self_samples.sample_from(model, kept, 7)
    state = torch.get_rng_state()
    assert torch.equal(self_samples.sample_from(model, kept, 7), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 1 + 1 + 2
    with pytest.raises(hf_lowrank.CheckpointError, match=r"another run, which differs in \['temperature'\]"):
        self_samples.sample_from(model, replace(kept, temperature=0.5), 7)


def test_samples_of_another_model_are_not_taken(llama, tmp_path):
    calibration = Calibration(samples=3, length=8, folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    self_samples.sample_from(model, calibration, 0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(hf_lowrank.CheckpointError, match=r"differs in \['model'\]"):
        self_samples.sample_from(model, calibration, 0)


def test_a_folder_with_an_allocation_that_probes(llama, tmp_path):
    config = LowRankConfig(
        method="whitened_svd",
        allocation={"name": "lems", "search_samples": 2},
        calibration=Calibration(samples=3, length=8, batch_size=2),
    )
    expected = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config).state_dict()
    for _ in range(2):
        config.calibration = replace(config.calibration, folder=tmp_path)
        found = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_refined_blocks_are_kept_in_the_folder(llama, tmp_path, monkeypatch):
    def load(folder):
        calibration = Calibration(samples=3, length=8, batch_size=2, folder=folder)
        config = LowRankConfig(param_ratio=0.5, refine={"name": "blocks", "epochs": 2}, calibration=calibration)
        return AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config).state_dict()

    expected = load(None)
    train, trained = hf_lowrank.refine.blocks.BlockRefinement._train, []

    def failing(self, block, goal, *args):
        trained.append(goal.block)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(self, block, goal, *args)

    monkeypatch.setattr(hf_lowrank.refine.blocks.BlockRefinement, "_train", failing)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    found = load(tmp_path)
    assert trained == ["model.layers.0", "model.layers.1", "model.layers.1"]
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert sorted(os.listdir(tmp_path)) == ["refine", "samples", "statistics"]


@pytest.mark.parametrize("folder", [3, ""])
def test_a_folder_that_is_none(folder, tmp_path):
    with pytest.raises(hf_lowrank.ConfigError, match="`folder`=.* of Calibration"):
        Calibration(folder=folder)
    (tmp_path / "file").touch()
    with pytest.raises(hf_lowrank.ConfigError, match="is a file; name a folder"):
        Calibration(folder=tmp_path / "file")


def whitened(**options):
    return LowRankConfig(method="whitened_svd", param_ratio=0.5, **options)


def test_a_mapping_of_sizes_in_a_dict_of_options(llama, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    data = {"data": str(tmp_path / "texts.txt"), "samples": 4, "length": 16}
    options = {"method": "whitened_svd", "param_ratio": 0.5, "calibration": data}
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=options)
    record = model.config.quantization_config.recipe["calibration"]
    assert (record["data"], record["tokens"]) == ("texts.txt", 64)
    batch = {"input_ids": torch.arange(3, 20)[None]}
    assert LowRankConfig.from_dict({"calibration": batch}).calibration is batch
    with pytest.raises(hf_lowrank.ConfigError, match=r"Calibration has no option \['sample'\]; its options are"):
        LowRankConfig.from_dict({"calibration": {"data": "a.txt", "sample": 4}})


@pytest.mark.parametrize(
    "calibration",
    ["self", "a.txt", "s.safetensors", None, Calibration("a.txt", samples=4, length=16), Calibration(folder="kept")],
)
def test_a_configuration_keeps_its_calibration_in_json(calibration):
    again = LowRankConfig.from_dict(json.loads(whitened(calibration=calibration).to_json_string()))
    assert again.calibration == calibration


def test_data_of_this_process_is_never_replaced_in_silence(llama):
    again = LowRankConfig.from_dict(json.loads(whitened(calibration=TEXTS).to_json_string()))
    with pytest.raises(hf_lowrank.CalibrationError, match="`calibration` is None"):
        AutoModelForCausalLM.from_pretrained(llama, lowrank_config=again)


def test_a_recipe_that_is_carried_out_again_needs_its_data(llama, recwarn):
    def load(config):
        model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)
        return model.config.quantization_config

    sampled = load(whitened(calibration=Calibration(samples=4, length=16)))
    assert load(sampled).recipe["calibration"] == sampled.recipe["calibration"]
    load(load(LowRankConfig(method="svd", calibration=TEXTS)))
    assert not [w for w in recwarn if "calibration data" in str(w.message)]
    given = load(whitened(calibration=Calibration(TEXTS, samples=4, length=16)))
    for config in (given, given.to_dict()):
        with pytest.warns(UserWarning, match=r"its calibration data was '40 texts'.*'self'\) takes its place"):
            assert load(config).recipe["calibration"]["data"] == "self"


def test_given_data_takes_the_place_of_what_is_recorded(llama, recwarn):
    config = whitened(calibration=Calibration(TEXTS, samples=4, length=16))
    model = AutoModelForCausalLM.from_pretrained(llama, lowrank_config=config)
    dense, batch = AutoModelForCausalLM.from_pretrained(llama), {"input_ids": torch.arange(3, 20)[None]}
    hf_lowrank.factorize(dense, model.config.quantization_config, calibration=[batch])
    assert not [w for w in recwarn if "calibration data" in str(w.message)]
    assert dense.config.quantization_config.recipe["calibration"]["data"] != "self"
