"""One choice at a time on copies of a model; measured once, gone on with after an interruption."""

import csv
import json

import pytest
import torch

from hf_lowrank import (
    Calibration,
    CalibrationError,
    CheckpointError,
    ConfigError,
    FormatLinear,
    LowRankConfig,
    NonFiniteError,
    RankError,
    StatisticsError,
    SweepPoint,
    TargetError,
    collect_statistics,
    factorize,
    summary,
    sweep,
)
from hf_lowrank.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")[0]


def names(model):
    return {name for name, module in model.named_modules() if isinstance(module, FormatLinear)}


class Measure:
    """The number of factorized layers, and which they were."""

    def __init__(self, last=99):
        self.seen, self.last = [], last

    def __call__(self, model):
        if len(self.seen) == self.last:
            raise KeyboardInterrupt
        self.seen.append(names(model))
        return float(len(self.seen[-1]))


def test_what_is_asked_for_is_factorized_and_nothing_else(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = [
        SweepPoint(4, [1], ["q_proj", "mlp.up_proj"]),
        SweepPoint(4, modules=["v_proj"]),
        SweepPoint(30, "spread:1", ["k_proj", "q_proj"]),
        SweepPoint(2),
        SweepPoint(2, [1, 0, 1]),
        SweepPoint(1000, [0]),
    ]
    measure = Measure()
    found = sweep(model, points, measure)
    assert measure.seen[0] == set()
    assert measure.seen[1] == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert measure.seen[2] == {f"model.layers.{block}.self_attn.v_proj" for block in (0, 1)}
    # A rank that would not make it smaller leaves a weight dense.
    assert measure.seen[3] == {"model.layers.1.self_attn.q_proj"}
    assert len(measure.seen[4]) == 14
    assert len(found.rows) == 5, "two are one"
    assert found.dense == 0
    assert [row.matrices for row in found.rows] == [row.score for row in found.rows] == [2, 2, 1, 14, 0]
    total = sum(p.numel() for p in model.parameters())
    saved = sum(model.get_submodule(name).weight.numel() - 4 * sum(model.get_submodule(name).weight.shape)
                for name in measure.seen[1])  # fmt: skip
    assert found.rows[0].kept == pytest.approx(1 - saved / total)
    assert found.find(points[4], 2) is found.rows[3]
    assert found.find(SweepPoint(3), 2) is None
    assert names(model) == set()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "dense: 0" in str(found)


def test_an_interrupted_sweep_goes_on(model, tmp_path):
    points, path = [SweepPoint(rank, [0], ["q_proj"]) for rank in (1, 2, 3)], tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, points, Measure(3), path=path, about={"text": "some"})
    rows, measure = [], Measure()
    found = sweep(model, points, measure, path=path, about={"text": "some"}, on_row=rows.append)
    assert len(measure.seen) == 1
    assert [row.rank for row in rows] == [3]
    assert [row.rank for row in found.rows] == [1, 2, 3]
    assert json.loads(path.read_text())["about"] == {"text": "some", "method": "tucker"}
    with pytest.raises(CheckpointError, match="holds a sweep of .*'some'.*and this one is of .*'other'"):
        sweep(model, points, measure, path=path, about={"text": "other"})
    found.save(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["rank"] for row in table] == ["1", "2", "3"]
    assert table[0]["modules"] == "q_proj"


@pytest.mark.parametrize("content", ["rank,layers", "[1]", "{}", '{"rows": [{"rank": 1}], "dense": 1}'])
def test_another_file_is_refused_and_left_alone(model, tmp_path, content):
    path, measure = tmp_path / "sweep.json", Measure()
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"sweep.json' holds no sweep \(.*; give another path"):
        sweep(model, [SweepPoint(1)], measure, path=path)
    assert path.read_text() == content
    with pytest.raises(ConfigError, match=r"sweep.csv' is to be a JSON file"):
        sweep(model, [SweepPoint(1)], measure, path=tmp_path / "sweep.csv")
    assert measure.seen == []


@pytest.mark.parametrize(
    ("layers", "count", "indices"),
    [
        ("all", 3, (0, 1, 2)),
        ("spread:3", 30, (5, 15, 25)),
        ("spread:2", 4, (1, 3)),
        ("spread:4", 4, (0, 1, 2, 3)),
        ("spread:1", 5, (2,)),
        ([2, 0], 3, (0, 2)),
    ],
)
def test_layers_that_are_meant(layers, count, indices):
    assert SweepPoint(1, layers).indices(count) == indices


def test_what_does_not_fit_is_refused_before_anything_is_measured(model):
    for options, match in (
        ({"rank": 0}, "`rank`=0 of a SweepPoint"),
        ({"rank": 1, "layers": "spread:0"}, "`layers`='spread:0' of a SweepPoint must be 'all'"),
        ({"rank": 1, "layers": []}, r"`layers`=\[\]"),
        ({"rank": 1, "modules": "q_proj"}, "`modules`='q_proj'"),
        (
            {"rank": 1, "modules": []},
            r"`modules`=\[\] of a SweepPoint must be a list of names or suffixes, at least one",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            SweepPoint(**options)
    measure = Measure()
    for point, match in (
        (SweepPoint(1, [2]), "exceeds the 2 blocks"),
        (SweepPoint(1, "spread:3"), "exceeds the 2 blocks"),
        (SweepPoint(1, [0], ["no_proj"]), "names 'no_proj', which matches no linear of its 1 blocks; they have 7"),
    ):
        with pytest.raises(TargetError, match=match):
            sweep(model, [SweepPoint(1), point], measure)
    with pytest.raises(TargetError, match="no repeated blocks"):
        sweep(torch.nn.Sequential(torch.nn.Linear(4, 4)), [SweepPoint(1)], measure)
    assert not measure.seen


JOINT = {"name": "tucker", "joint_groups": [["q_proj", "k_proj", "v_proj"]]}


@pytest.mark.parametrize(
    "options", [{"method": JOINT}, {"about": {"a": (1, 2)}}, {"about": {1: 2}}, {"about": {"a": [{"b": ((),)}]}}]
)
def test_what_json_makes_of_the_facts_is_not_taken_for_others(model, tmp_path, options):
    points, path = [SweepPoint(2), SweepPoint(4)], tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, points, Measure(2), path=path, **options)
    measure = Measure()
    found = sweep(model, points, measure, path=path, **options)
    assert len(measure.seen) == 1
    assert found.to_json() == json.loads(path.read_text())


@pytest.mark.parametrize("about", [{"a": torch.float32}, {"a": float("nan")}, {(1, 2): 3}, [1], "text"])
def test_facts_that_are_no_json_are_refused_before_anything_is_measured(model, about):
    measure = Measure()
    with pytest.raises(ConfigError, match="`about`="):
        sweep(model, [SweepPoint(1)], measure, about=about)
    assert not measure.seen


def test_a_file_of_another_model_is_refused(model, tmp_path):
    points, path = [SweepPoint(2, [0])], tmp_path / "sweep.json"
    sweep(model, points, Measure(), path=path)
    content, measure = path.read_text(), Measure()
    assert json.loads(content)["facts"]["model"]["class"] == "LlamaForCausalLM"
    renamed, halved = tiny_model("llama")[0], tiny_model("llama")[0].bfloat16()
    renamed.name_or_path = "owner/finetuned"
    larger = type(model)(type(model.config)(**{**model.config.to_dict(), "intermediate_size": 104}))
    for other, match in (
        (tiny_model("qwen2")[0], "'Qwen2ForCausalLM'"),
        (renamed, "'owner/finetuned'"),
        (halved, "'bfloat16'"),
        (larger, "'linears'"),
    ):
        with pytest.raises(
            CheckpointError, match=f"holds a sweep of another model or other .*this one is of .*{match}"
        ):
            sweep(other, points, measure, path=path)
    told_nothing = {key: value for key, value in json.loads(content).items() if key != "facts"}
    path.write_text(json.dumps(told_nothing))
    with pytest.raises(CheckpointError, match="holds a sweep of another model"):
        sweep(model, points, measure, path=path)
    assert not measure.seen
    path.write_text(content)
    assert len(sweep(model, points, measure, path=path).rows) == 1 and not measure.seen


def batches(seed):
    return [{"input_ids": torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(seed))}]


def test_a_file_of_other_calibration_data_is_refused(model, tmp_path):
    points, path = [SweepPoint(2, [0])], tmp_path / "sweep.json"
    for given, others in (
        (batches(0), [batches(1), [*batches(0), *batches(1)], "self"]),
        (Calibration("self", 2, 6), [Calibration("self", 3, 6), batches(0)]),
        (
            collect_statistics(model, Calibration("self", 2, 6), method="whitened_svd"),
            [collect_statistics(model, Calibration("self", 3, 6), method="whitened_svd")],
        ),
    ):
        sweep(model, points, Measure(), "whitened_svd", given, path)
        again, measure = sweep(model, points, measure := Measure(), "whitened_svd", given, path), measure
        assert not measure.seen and len(again.rows) == 1
        for other in others:
            with pytest.raises(CheckpointError, match=r"other calibration data: it says \{'calibration'"):
                sweep(model, points, measure, "whitened_svd", other, path)
        assert not measure.seen
        path.unlink()


@pytest.mark.parametrize("method", ["whitened_svd", "kfac_svd"])
@pytest.mark.parametrize("kind", ["list", "iterator", "self", "folder"])
def test_calibration_data_gives_every_choice_what_it_gives_it_alone(model, method, kind, tmp_path):
    folder = tmp_path / "parts" if kind == "folder" else None
    data = {"list": batches(0), "iterator": batches(0), "folder": batches(0), "self": "self"}[kind]
    calibration = Calibration(data, samples=2, length=8)
    given = Calibration(iter(data) if kind == "iterator" else data, samples=2, length=8, folder=folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    points = [SweepPoint(4, [0]), SweepPoint(6, modules=["up_proj", "q_proj"])]

    def measure(one):
        return sum(row.relative_error or 0 for row in summary(one).rows)

    found = sweep(model, points, measure, method, given)
    for point, row in zip(points, found.rows, strict=True):
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and any(name.startswith(f"model.layers.{block}.") for block in row.layers)
            and (point.modules is None or name.rpartition(".")[2] in point.modules)
        ]
        config = LowRankConfig(method=method, rank=point.rank, target_modules=targets, calibration=None)
        alone = factorize(tiny_copy(model), config, calibration)
        assert measure(alone) > 0
        assert row.score == pytest.approx(measure(alone), rel=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())


def tiny_copy(model):
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_what_cannot_be_done_to_a_later_choice_is_refused_before_the_first(model, tmp_path):
    measure, few = Measure(), [SweepPoint(4), SweepPoint(8)]
    statistics = collect_statistics(model, batches(0), method="whitened_svd", target_modules=["q_proj"])
    experts = tiny_model("mixtral")[0]
    broken = tiny_copy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    for options, error, match in (
        ({"model": experts, "points": [SweepPoint(8), SweepPoint(12)]}, RankError, "rank=12 for .* multiple of 8"),
        ({"method": "whitened_svd"}, CalibrationError, "needs calibration statistics and `calibration` is None"),
        ({"method": "whitened_svd", "calibration": "no.txt"}, CalibrationError, "'no.txt' does not exist"),
        ({"method": "whitened_svd", "calibration": "no.safetensors"}, CalibrationError, "does not exist"),
        ({"method": "whitened_svd", "calibration": ["some text"]}, CalibrationError, "no `name_or_path`"),
        ({"method": "whitened_svd", "calibration": statistics}, StatisticsError, "another model"),
        (
            {"model": broken, "points": [SweepPoint(4, [0]), SweepPoint(4, [1])]},
            NonFiniteError,
            "layers.1.mlp.up_proj",
        ),
        ({"path": tmp_path / "none" / "x.json"}, ConfigError, "`path`=.*in a folder that is not there; make"),
        ({"path": tmp_path}, ConfigError, "`path`=.*is a folder"),
        ({"points": SweepPoint(4)}, ConfigError, r"`points`=SweepPoint\(rank=4.*must be a list of SweepPoint"),
        ({"points": [SweepPoint(4), 8]}, ConfigError, "`points`=.* must be a list of SweepPoint"),
        ({"model": factorize(tiny_copy(model), LowRankConfig(method="svd"))}, ConfigError, "is factorized already"),
    ):
        with pytest.raises(error, match=match):
            sweep(**{"model": model, "points": few, "measure": measure, **options})
    assert not measure.seen


def test_modules_in_any_order_are_the_same(model, tmp_path):
    path, measure = tmp_path / "sweep.json", Measure()
    points = [SweepPoint(4, modules=given) for given in (["q_proj", "k_proj"], ["k_proj", "q_proj"], ["k_proj"] * 2)]
    found = sweep(model, points, measure, path=path)
    assert len(found.rows) == 2 and len(measure.seen) == 3
    content = json.loads(path.read_text())
    content["rows"][0]["modules"] = ["q_proj", "k_proj", "q_proj"]
    path.write_text(json.dumps(content))
    again = sweep(model, points, measure, path=path)
    assert len(measure.seen) == 3 and again.find(points[1], 2) is again.rows[0]
