"""Block by block gives what one pass gives, bit for bit, in the memory of one block and across interruptions."""

import gc
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_lowrank import CalibrationError, CheckpointError, LowRankError, ResourceError, Statistics, StatisticsError
from hf_lowrank.statistics import STATISTICS
from hf_lowrank.statistics.collect import collect
from hf_lowrank.statistics.input_gram import InputGram
from hf_lowrank.statistics.sequential import collect_sequentially
from hf_lowrank.statistics.store import StatisticsFiles
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import ARCHITECTURES, tiny_model


KFAC = ["input_gram", "gradient_gram"]
SEVERAL_CHAINS = {"t5", "whisper", "llava"}
ONE_CHAIN = sorted(set(ARCHITECTURES) - SEVERAL_CHAINS)


def assert_equal(found, expected, sites, names):
    assert found.provenance == expected.provenance
    for site in sites:
        a, b = (statistics.get(site.name, names) for statistics in (found, expected))
        for name in names:
            assert torch.equal(a[name], b[name]), (site.name, name)


def contents(folder):
    """Every file below `folder` and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def two_batches(inputs):
    batch = inputs()
    return [batch, {key: value.flip(0) for key, value in batch.items()}]


def compare(model, batches, folder, names=KFAC, targets="all-linear"):
    sites = match_sites(model, targets)
    expected = collect(model, sites, names, batches, {"data": "batches"}, seed=3)
    found = collect_sequentially(model, sites, names, batches, folder, {"data": "batches"}, seed=3)
    assert_equal(found, expected, sites, names)


@pytest.mark.parametrize("names", [KFAC, ["fisher_columns"]], ids=["sampled", "by sample"])
@pytest.mark.parametrize("architecture", ONE_CHAIN)
def test_gradients_are_those_of_one_pass(architecture, names, tmp_path):
    model, inputs = tiny_model(architecture)
    compare(model, two_batches(inputs), tmp_path, names)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llava"}))
def test_input_statistics_do_not_need_one_chain(architecture, tmp_path):
    model, inputs = tiny_model(architecture)
    names = [name for name in STATISTICS.names() if name.startswith("input_")]
    compare(model, two_batches(inputs), tmp_path, names)


def test_bfloat16(tmp_path):
    model, inputs = tiny_model("llama")
    compare(model.bfloat16(), two_batches(inputs), tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "bert", "mixtral", "gpt2"])
def test_padding(architecture, side, tmp_path):
    model, inputs = tiny_model(architecture)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask = mask.flip(1) if side == "right" else mask
    batches = [{**inputs(), "attention_mask": mask}, inputs(), {**inputs(), "attention_mask": mask.flip(0)}]
    compare(model, batches, tmp_path)


def test_the_encoders_output_keeps_its_mask(tmp_path):
    # The same length on both sides, where shapes alone cannot tell the masks apart.
    model, _ = tiny_model("t5")
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(2, 2, 6).long()
    masks[0, :, :4] = masks[1, :, :3] = 1
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    batch |= {"attention_mask": masks[0], "decoder_attention_mask": masks[1]}
    compare(model, [batch], tmp_path / "inputs", ["input_gram"])
    compare(model, [batch], tmp_path / "gradients", KFAC, r"decoder\..*")


def test_one_chain_of_several_can_be_targeted(tmp_path):
    model, inputs = tiny_model("whisper")
    compare(model, [inputs()], tmp_path / "decoder", KFAC, r"model\.decoder\..*")
    compare(model, [inputs()], tmp_path / "encoder", KFAC, r"model\.encoder\.layers\..*")


def test_blocks_without_targets_hand_the_gradient_on(tmp_path):
    model, inputs = tiny_model("llama")
    compare(model, [inputs()], tmp_path, KFAC, r"model\.layers\.0\..*")


def test_labels_in_the_data(tmp_path):
    model, inputs = tiny_model("llama")
    batch = inputs()
    compare(model, [{**batch, "labels": batch["input_ids"]}], tmp_path, ["fisher_columns"])


@pytest.mark.parametrize("architecture", sorted(SEVERAL_CHAINS))
def test_several_chains_are_refused(architecture, tmp_path):
    model, inputs = tiny_model(architecture)
    with pytest.raises(CalibrationError, match="does not read what .* has made; leave `folder` of Calibration unset"):
        collect_sequentially(model, match_sites(model), KFAC, [inputs()], tmp_path)
    assert not contents(tmp_path)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, beside=None):
        x = x + self.linear(x).tanh()
        return x + beside if isinstance(beside, torch.Tensor) else x


class Net(nn.Module):
    """Three blocks, and a switch for everything that makes a block more than a link of a chain."""

    def __init__(self, trait=None):
        super().__init__()
        self.front = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 5)
        self.trait = trait

    def forward(self, x, trait=None):
        self.trait = trait or self.trait
        if self.trait == "front":
            x = self.front(x)
        first = hidden = self.blocks[0](x)
        hidden = self.blocks[1](hidden, SimpleNamespace() if self.trait == "object" else None)
        if self.trait == "twice":
            hidden = self.blocks[1](hidden)
        if self.trait == "in place":
            hidden.mul_(2)
        if self.trait == "between":
            hidden = hidden * 2
        if self.trait == "short":
            return {"logits": self.head(hidden)}
        hidden = self.blocks[2](hidden, first * 2 if self.trait == "beside" else None)
        return {"logits": self.head(hidden + first if self.trait == "skip" else hidden)}


@pytest.mark.parametrize(
    ("trait", "message"),
    [
        ("in place", "In batch 0, blocks.2 does not read what the block before has made, as it is"),
        ("between", "blocks.2 does not read what blocks.1 has made"),
        ("front", "front runs in front of the last block"),
        ("twice", "blocks.1 runs more than once"),
        ("object", "blocks.1 is called with a SimpleNamespace"),
        ("beside", "blocks.2 reads something of an earlier block"),
        ("skip", "the loss reads something of an earlier block"),
    ],
)
def test_what_is_no_chain_is_refused_and_not_miscounted(trait, message, tmp_path):
    model = Net(trait)
    targets = ["front", "linear"] if trait == "front" else ["linear"]
    with pytest.raises(LowRankError, match=message) as caught:
        collect_sequentially(model, match_sites(model, targets), KFAC, [{"x": torch.randn(2, 3, 4)}], tmp_path)
    assert "leave `folder` of Calibration unset" in str(caught.value)
    assert not [name for name in contents(tmp_path) if name.endswith("linear.safetensors")]


@pytest.mark.parametrize("trait", ["twice", "in place", "between"])
def test_a_later_batch_that_leaves_the_chain_is_noticed(trait, tmp_path):
    model = Net()
    batches = [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(2, 3, 4), "trait": trait}]
    with pytest.raises(CalibrationError, match="In batch 1, blocks.[12] does not read what the block before has made"):
        collect_sequentially(model, match_sites(model, ["linear"]), KFAC, batches, tmp_path)


def test_a_batch_that_stops_early_is_noticed(tmp_path):
    model, x = Net(), torch.randn(2, 3, 4)
    sites = match_sites(model, ["linear"])
    with pytest.raises(CalibrationError, match="Batch 1 does not reach blocks.2"):
        collect_sequentially(model, sites, KFAC, [{"x": x}, {"x": x, "trait": "short"}], tmp_path / "later")
    with pytest.raises(CalibrationError, match="The first batch does not reach blocks.2"):
        collect_sequentially(model, sites, KFAC, [{"x": x, "trait": "short"}], tmp_path / "first")


def test_an_auxiliary_loss_of_the_routers_is_noticed(tmp_path):
    model, inputs = tiny_model("mixtral")
    model.config.output_router_logits = True
    batch = inputs()
    batch["labels"] = batch["input_ids"]
    with pytest.raises(CalibrationError, match="the loss reads something of an earlier block"):
        collect_sequentially(model, match_sites(model), ["fisher_columns"], [batch], tmp_path)


def test_a_model_without_blocks(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="Sequential has no repeated blocks"):
        collect_sequentially(model, match_sites(model), ["input_gram"], [{"input": torch.randn(3, 4)}], tmp_path)


def test_accumulators_of_one_block_at_a_time(tmp_path, monkeypatch):
    model, inputs = tiny_model("llama")
    alive, most = weakref.WeakSet(), []
    for name in KFAC:
        cls = STATISTICS[name]

        def init(self, features, device, cls=cls, original=cls.__init__):
            original(self, features, device)
            alive.add(self)
            most.append(len(alive))

        monkeypatch.setattr(cls, "__init__", init)
    sites = match_sites(model)
    gc.disable()
    try:
        collect_sequentially(model, sites, KFAC, two_batches(inputs), tmp_path)
        assert max(most) == 4 + 7
        most.clear()
        collect(model, sites, KFAC, two_batches(inputs))
        assert max(most) == 2 * (4 + 7)
    finally:
        gc.enable()


def test_needs_are_said_up_front_and_kept(tmp_path, monkeypatch, caplog):
    model, inputs = tiny_model("llama")
    batches, sites = two_batches(inputs), match_sites(model)
    collect_block = InputGram.update
    monkeypatch.setattr(InputGram, "update", lambda *_: 1 / 0)
    with caplog.at_level(logging.INFO, "hf_lowrank"), pytest.raises(ZeroDivisionError):
        collect_sequentially(model, sites, KFAC, batches, tmp_path)
    assert "2 blocks" in caplog.text
    assert "GiB of memory for the statistics of a block" in caplog.text
    needed = json.loads((tmp_path / "statistics" / "manifest.json").read_text())["facts"]["bytes"]
    # Each file has a header, and the state of the generator takes 5 kB.
    header = 1000
    states = contents(tmp_path)
    written = sum(map(len, states.values()))
    assert 0.5 * needed["states"] < written < needed["states"] + 12_000 + header * len(states)
    monkeypatch.setattr(InputGram, "update", collect_block)
    collect_sequentially(model, sites, KFAC, batches, tmp_path)
    statistics = {k: v for k, v in contents(tmp_path).items() if k.endswith(".safetensors")}
    assert abs(sum(map(len, statistics.values())) - needed["statistics"]) < 2 * header * len(statistics)
    assert needed["accumulators"] * 2 == needed["statistics"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    model, inputs = tiny_model("llama")
    with pytest.raises(ResourceError, match="name a `folder` on a larger disk"):
        collect_sequentially(model, match_sites(model), KFAC, [inputs()], tmp_path)
    assert not contents(tmp_path)


def test_too_little_memory_for_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    model, inputs = tiny_model("llama")
    with pytest.raises(ResourceError, match="The statistics of one block need"):
        collect_sequentially(model, match_sites(model), KFAC, [inputs()], tmp_path)
    assert not contents(tmp_path)


def test_only_statistics_stay(tmp_path):
    model, inputs = tiny_model("llama")
    collect_sequentially(model, match_sites(model), KFAC, [inputs()], tmp_path)
    kept = {"manifest.json", "outside.safetensors", "model.layers.0.safetensors", "model.layers.1.safetensors"}
    assert set(os.listdir(tmp_path / "statistics")) == kept


def test_a_finished_folder_is_read_and_nothing_runs(tmp_path, monkeypatch):
    model, inputs = tiny_model("bert")
    sites, batches = match_sites(model), [inputs()]
    first = collect_sequentially(model, sites, KFAC, batches, tmp_path)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    assert_equal(collect_sequentially(model, sites, KFAC, batches, tmp_path), first, sites, KFAC)


def test_another_run_is_refused_and_says_what_differs(tmp_path):
    model, inputs = tiny_model("llama")
    sites, batches = match_sites(model), [inputs()]
    collect_sequentially(model, sites, KFAC, batches, tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    for different, arguments in {
        r"\['model'\]": (sites, KFAC, batches),
        r"\['model', 'statistics'\]": (sites, ["input_gram"], batches),
        r"\['batches', 'model'\]": (sites, KFAC, batches * 2),
        r"\['model', 'sites'\]": (sites[1:], KFAC, batches),
    }.items():
        with pytest.raises(CheckpointError, match=f"differs in {different}; .* give an empty `folder`, or remove"):
            collect_sequentially(model, *arguments, tmp_path)
    with pytest.raises(CheckpointError, match="seed"):
        collect_sequentially(model, sites, KFAC, batches, tmp_path, seed=1)
    assert contents(tmp_path) == before


def test_a_part_that_was_taken_away(tmp_path):
    model, inputs = tiny_model("llama")
    arguments = model, match_sites(model), KFAC, [inputs()], tmp_path
    collect_sequentially(*arguments)
    (tmp_path / "statistics" / "model.layers.0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Cannot read .*; give an empty `folder`, or remove"):
        collect_sequentially(*arguments)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]"])
def test_a_damaged_manifest(damage, tmp_path):
    model, inputs = tiny_model("llama")
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "manifest.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="Cannot read .*manifest.json"):
        collect_sequentially(model, match_sites(model), KFAC, [inputs()], tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "bert", "mixtral"])
def test_an_error_in_a_hook_leaves_a_clean_model_and_the_next_call_goes_on(architecture, tmp_path, monkeypatch):
    model, inputs = tiny_model(architecture)
    model.train()
    sites, batches = match_sites(model), two_batches(inputs)
    whole = collect_sequentially(model, sites, KFAC, batches, tmp_path / "whole")
    flags = [p.requires_grad for p in model.parameters()]
    update, left = InputGram.update, [0]

    def fails(self, rows):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        update(self, rows)

    monkeypatch.setattr(InputGram, "update", fails)
    interruptions = 0
    for patience in range(1, 40):
        left[0] = patience
        try:
            found = collect_sequentially(model, sites, KFAC, batches, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            interruptions += 1
        assert model.training
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not [name for name in contents(tmp_path / "parts") if name.endswith(".partial")]
    assert interruptions > 3
    assert_equal(found, whole, sites, KFAC)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_overflow_is_named(tmp_path):
    model, inputs = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        collect_sequentially(model, match_sites(model), ["input_gram"], [inputs()], tmp_path)


def test_no_batches(tmp_path):
    model, _ = tiny_model("llama")
    with pytest.raises(CalibrationError, match="gave no batch"):
        collect_sequentially(model, match_sites(model), KFAC, iter(()), tmp_path)


def test_save_to_one_file_with_one_tensor_in_memory(tmp_path, monkeypatch):
    model, inputs = tiny_model("llama")
    sites = match_sites(model)
    found = collect_sequentially(model, sites, KFAC, [inputs()], tmp_path)
    read, alive, most = StatisticsFiles._read, weakref.WeakSet(), []

    def spy(self, owner, name):
        tensor = read(self, owner, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(StatisticsFiles, "_read", spy)
    found.save(tmp_path / "one.safetensors")
    assert max(most) == 1
    monkeypatch.undo()
    expected = collect(model, sites, KFAC, [inputs()])
    for statistics in (Statistics.load(tmp_path / "one.safetensors"), pickle.loads(pickle.dumps(found))):
        assert_equal(statistics, expected, sites, KFAC)
    # Readers that map the file want aligned numbers.
    assert all(tensor.data_ptr() % 8 == 0 for tensor in load_file(tmp_path / "one.safetensors").values())


# Each child is killed at another write: before a file gets its name (an odd number), or right after. Children are
# forked, so that the imports are paid for once, and before anything runs backward, which does not survive a fork.
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from hf_lowrank import Calibration, collect_statistics
from hf_lowrank.testing import tiny_model

root, architecture, points = sys.argv[1], sys.argv[2], [int(point) for point in sys.argv[3:]]
replace, written = os.replace, 0

def collect(folder):
    model, inputs = tiny_model(architecture)
    data = "self" if architecture == "llama" else [inputs() for _ in range(4)]
    calibration = Calibration(data, samples=8, length=6, batch_size=1, folder=os.path.join(root, folder))
    collect_statistics(model, calibration, seed=5)

def dying(source, target, point):
    global written
    written += 1
    if 2 * written == point + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if 2 * written == point:
        os.kill(os.getpid(), signal.SIGKILL)

for point in points:
    child = os.fork()
    if child == 0:
        os.replace = lambda source, target: dying(source, target, point)
        collect(str(point))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
torch.manual_seed(1)
for point in points:
    collect(str(point))
collect("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("architecture", "points"), [("llama", range(1, 94, 5)), ("bert", range(1, 48, 5))])
def test_killed_at_any_point_the_next_run_ends_in_the_same_bits(architecture, points, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), architecture, *map(str, points)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = contents(tmp_path / "whole")
    for point in points:
        assert contents(tmp_path / str(point)) == expected, point
