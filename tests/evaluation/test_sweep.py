"""One choice at a time on copies of a model; measured once, gone on with after an interruption."""

import csv
import json

import pytest
import torch

from hf_lowrank import CheckpointError, ConfigError, FormatLinear, SweepPoint, TargetError, sweep
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
