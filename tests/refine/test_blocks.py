"""Block refinement: what it improves, what it leaves alone, and that a kill costs nothing but time."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trained_formats import FORMATS
from walks import batches_of, last_hidden

from hf_lowrank import CheckpointError, ConfigError, LowRankConfig, NonFiniteError, factorize, summary
from hf_lowrank.blocks import Chain, block_names, find_chains, hidden_of, record
from hf_lowrank.refine import REFINEMENTS
from hf_lowrank.refine.blocks import BlockRefinement
from hf_lowrank.statistics.collect import call_arguments
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import ARCHITECTURES, tiny_model


OPTIONS = {"method": "svd", "param_ratio": 0.4, "rank_multiple": 1}
# An encoder and a decoder, or two encoders, one after the other.
CHAINS = {"t5": 2, "whisper": 2, "llava": 2}


def block_errors(dense, model, batches):
    """Relative squared error of the hidden states after the last block of each chain."""
    ends = zip(*(last_hidden(which, dense, batches) for which in (dense, model)), strict=True)
    return [float((a - b).square().sum() / a.square().sum()) for a, b in ends]


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"deepseek_v3"}))
def test_chains_follow_the_blocks_of_every_architecture(name):
    model, inputs = tiny_model(name)
    names = block_names(model, [site.name for site in match_sites(model)])
    arguments, after = call_arguments(model, inputs()), {}
    for block in names:
        model.get_submodule(block).register_forward_hook(lambda m, a, out, n=block: after.update({n: hidden_of(out)}))
    with torch.no_grad():
        chains = find_chains(model, names, lambda: model(**arguments))
        assert len(chains) == CHAINS.get(name, 1)
        assert sorted(n for chain in chains for n in chain.names) == sorted(names)
        for chain in chains:
            walk = record(model, Chain(chain.names), [lambda: model(**arguments)])
            model(**arguments)
            expected = after[chain.names[-1]]
            for block in chain.names:
                walk.advance(model.get_submodule(block), block)
            assert torch.equal(walk.inputs[0], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "whisper"])
def test_refined_blocks_come_closer_to_the_dense_ones(name):
    model, inputs = tiny_model(name)
    dense, plain, batches = copy.deepcopy(model), copy.deepcopy(model), batches_of(inputs)
    factorize(plain, LowRankConfig(**OPTIONS), calibration=batches)
    refined = factorize(model, LowRankConfig(**OPTIONS, refine={"name": "blocks", "epochs": 20}), calibration=batches)
    assert [row.rank for row in summary(refined).rows] == [row.rank for row in summary(plain).rows]
    before, after = block_errors(dense, plain, batches), block_errors(dense, refined, batches)
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("options", FORMATS[:-1], ids=lambda options: str(options["method"]))
def test_every_format_that_stays_in_its_block_is_trained(options):
    model, inputs = tiny_model("llama")
    dense, plain, batches = copy.deepcopy(model), copy.deepcopy(model), batches_of(inputs)
    options = {**OPTIONS, **options}
    factorize(plain, LowRankConfig(**options), calibration=batches)
    factorize(model, LowRankConfig(**options, refine={"name": "blocks", "epochs": 20}), calibration=batches)
    ((before,), (after,)) = block_errors(dense, plain, batches), block_errors(dense, model, batches)
    assert after < 0.8 * before


def test_bfloat16_blocks_are_trained_in_float32_and_stay_bfloat16():
    model, inputs = tiny_model("llama")
    model = model.to(torch.bfloat16)
    plain, dense, batches = copy.deepcopy(model), copy.deepcopy(model), batches_of(inputs)
    factorize(plain, LowRankConfig(**OPTIONS), calibration=batches)
    factorize(model, LowRankConfig(**OPTIONS, refine={"name": "blocks", "epochs": 20}), calibration=batches)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert block_errors(dense, model, batches)[0] < 0.9 * block_errors(dense, plain, batches)[0]


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, inputs = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = []
    train = BlockRefinement._train

    def fail_on_the_second(self, block, goal, *args):
        trained.append(goal.block)
        if len(trained) == 2:
            raise NonFiniteError("diverges")
        train(self, block, goal, *args)

    monkeypatch.setattr(BlockRefinement, "_train", fail_on_the_second)
    with pytest.raises(NonFiniteError):
        factorize(model, LowRankConfig(**OPTIONS, refine="blocks"), calibration=batches_of(inputs))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def soften(model, site):
    """Something for the refinement to mend."""
    model.get_parameter(site.weight_name).data.mul_(0.9)


def run(model, sites, folder, batches, **options):
    """The parameters of a refined copy of `model`."""
    twin = copy.deepcopy(model)
    calls = [call_arguments(twin, batch) for batch in batches]
    BlockRefinement(epochs=2, **options).refine(twin, sites, lambda site: soften(twin, site), calls, 0, folder)
    return twin.state_dict()


def test_a_finished_block_is_not_trained_again(tmp_path, monkeypatch):
    model, inputs = tiny_model("llama")
    sites, batches = match_sites(model), batches_of(inputs)
    expected = run(model, sites, str(tmp_path), batches)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"model.layers.{i}.safetensors" for i in range(2)]
    monkeypatch.setattr(BlockRefinement, "_train", lambda *args: pytest.fail("trained again"))
    resumed = run(model, sites, str(tmp_path), batches)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_the_folder_of_another_run_is_refused(tmp_path):
    model, inputs = tiny_model("llama")
    sites, batches = match_sites(model), batches_of(inputs)
    run(model, sites, str(tmp_path), batches)
    with pytest.raises(CheckpointError, match=r"model.layers.0.safetensors was written by another run"):
        run(model, sites, str(tmp_path), batches, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="another run"):
        run(model, sites, str(tmp_path), batches_of(inputs, 2))


KILLED = """
import os, signal, sys
sys.path[:0] = {tests!r}
from test_blocks import BlockRefinement, match_sites, run, tiny_model
from walks import batches_of
model, inputs = tiny_model("llama")
train = BlockRefinement._train

def then_die(self, block, goal, *args):
    train(self, block, goal, *args)
    if goal.block.endswith(".1"):
        os.kill(os.getpid(), signal.SIGKILL)

BlockRefinement._train = then_die
run(model, match_sites(model), {folder!r}, batches_of(inputs))
"""


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    model, inputs = tiny_model("llama")
    sites, batches = match_sites(model), batches_of(inputs)
    expected = run(model, sites, None, batches)
    here = Path(__file__).parent
    code = KILLED.format(tests=[str(here), str(here.parent)], folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.layers.0.safetensors"]
    resumed = run(model, sites, str(tmp_path), batches)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, r"`epochs`=-1 of blocks must be an integer of at least 0"),
        ({"learning_rate": 0}, r"`learning_rate`=0 of blocks must be a number above 0"),
        ({"max_grad_norm": -1}, r"`max_grad_norm`=-1 of blocks must be a number above 0"),
        ({"warmup_ratio": 1.0}, r"`warmup_ratio`=1.0 of blocks must be a number in \[0, 1\)"),
        ({"steps": 3}, r"refine 'blocks' has no option \['steps'\]"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(refine={"name": "blocks", **options})


def test_a_model_without_blocks_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="needs repeated blocks"):
        REFINEMENTS["blocks"]().refine(model, match_sites(model), lambda site: None, [], 0)


def test_a_learning_rate_that_diverges_is_named():
    model, inputs = tiny_model("llama")
    with pytest.raises(NonFiniteError, match=r"model.layers.\d diverges.*lower `learning_rate`=1e\+30"):
        factorize(
            model,
            LowRankConfig(**OPTIONS, refine={"name": "blocks", "learning_rate": 1e30}),
            calibration=batches_of(inputs),
        )
