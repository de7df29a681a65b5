"""Models with dictionaries: budgets to the byte, shared ones saved once, supports that training leaves alone."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank import (
    METHODS,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DenseSparseLinear,
    LowRankConfig,
    LowRankError,
    RankError,
    collect_statistics,
    factorize,
    summary,
    to_dense,
)
from hf_lowrank.methods import Factors
from hf_lowrank.rewrite import absorb
from hf_lowrank.surgery import factorized, match_sites, specs
from hf_lowrank.testing import make_weight, tiny_model


QKV, FEED = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
ALONE = "compot"
PURSUIT = {"name": "cospadi", "num_iters": 2}
JOINT = {"name": "compot", "joint_groups": [QKV, FEED]}
BOTH = {**JOINT, "share_layers": 2}
EVERY = {"alone": ALONE, "pursuit": PURSUIT, "joint": JOINT, "both": BOTH}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dictionaries")
    model, inputs = tiny_model("llama")
    model.save_pretrained(folder / "dense")
    collect_statistics(model, [inputs()], method="compot").save(folder / "statistics.safetensors")
    return folder, inputs


def dense(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype)


def config_for(folder, method, **options):
    options = {"param_ratio": 0.5, "rank_multiple": 1, **options}
    return LowRankConfig(method=method, calibration=str(folder / "statistics.safetensors"), **options)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs()).logits


def lenders(model):
    return {name: spec["basis"] for name, spec in specs(model).items() if "basis" in spec}


@pytest.mark.parametrize("name", EVERY)
def test_in_memory_while_loading_and_reloaded_are_one_model(llama, tmp_path, name):
    folder, inputs = llama
    config = config_for(folder, EVERY[name])
    model = factorize(dense(folder), config)
    streamed = AutoModelForCausalLM.from_pretrained(folder / "dense", lowrank_config=config)
    assert torch.equal(logits(model, inputs), logits(streamed, inputs))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert lenders(again) == lenders(model)
    assert bool(lenders(again)) == (name in ("joint", "both"))
    for borrower, lender in lenders(again).items():
        assert again.get_submodule(borrower).basis is again.get_submodule(lender).dictionary
        assert again.get_submodule(borrower).dictionary is None
    to_dense(again)
    assert not factorized(again)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("accounting", ["mask", "effective"])
def test_the_file_is_what_the_accounting_says_to_the_byte(llama, tmp_path, name, accounting):
    folder, _ = llama
    method = EVERY[name] if isinstance(EVERY[name], dict) else {"name": EVERY[name]}
    model = factorize(dense(folder, torch.bfloat16), config_for(folder, {**method, "accounting": accounting}))
    model.save_pretrained(tmp_path)
    layers = dict(factorized(model))
    targets = match_sites(dense(folder))
    assert len(layers) == len(targets)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    size = sum(t.nbytes for key, t in stored.items() if any(key.startswith(f"{name}.") for name in layers))
    expected = masks = 0
    for layer in map(model.get_submodule, layers):
        own = DenseSparseLinear.stored_bytes(
            layer.out_features, layer.in_features, layer.rank, 2, nonzeros=layer.nonzeros
        )
        expected += own - (0 if layer.lender is None else 2 * layer.rank * layer.in_features)
        masks += sum(t.nbytes for key, t in layer.state_dict().items() if key in ("mask", "indices"))
    assert size == expected
    budget = 0.5 * 2 * sum(site.out_features * site.in_features for site in targets)
    # Every weight may miss its share by less than one atom.
    counted = size - (masks if accounting == "effective" else 0)
    assert 0.9 * budget < counted <= budget
    assert (size > budget) == (accounting == "effective")


def test_a_budget_of_bytes_counts_masks_whatever_the_accounting(llama, tmp_path):
    folder, _ = llama
    for accounting in ("mask", "effective"):
        method = {**BOTH, "accounting": accounting}
        config = config_for(folder, method, param_ratio=None, target_bytes=260_000)
        factorize(dense(folder), config).save_pretrained(tmp_path / accounting)
        size = (tmp_path / accounting / "model.safetensors").stat().st_size
        assert 0.9 * 260_000 < size <= 260_000


@pytest.mark.parametrize("accounting", ["mask", "effective"])
def test_what_would_be_larger_than_dense_stays_dense(llama, accounting):
    folder, _ = llama
    ranks = []
    for ratio in (0.9, 0.99):
        model = dense(folder, torch.bfloat16)
        method = {"name": "compot", "num_iters": 0, "accounting": accounting}
        rows = summary(factorize(model, config_for(folder, method, param_ratio=ratio))).rows
        assert all(row.bytes < row.dense_bytes for row in rows)
        ranks.append({row.name: row.rank for row in rows})
    assert len(ranks[0]) == 14
    # At 0.99 of the dense weight all would be larger: some stay dense, and others make up for them.
    assert len(ranks[1]) == 14 if accounting == "mask" else 0 < len(ranks[1]) < 14


@pytest.mark.parametrize("allocation", ["knapsack", "energy", {"name": "lems", "search_samples": 1}])
@pytest.mark.parametrize("method", [ALONE, BOTH])
def test_allocators_work_on_dictionaries(llama, allocation, method):
    folder, inputs = llama
    options = {"param_ratio": 0.5, "rank_multiple": 8, "allocation": allocation}
    options["method"] = {**(method if isinstance(method, dict) else {"name": method}), "num_iters": 1}
    config = LowRankConfig(**options, calibration=[inputs()])
    rows = summary(factorize(dense(folder), config)).rows
    assert {row.format for row in rows} == {"dense_sparse"}
    assert len({row.rank for row in rows}) > 1


def test_a_group_of_one_is_the_layer_alone_and_one_input_has_one_gram(llama):
    folder, _ = llama
    weight = torch.cat([p.detach() for name, p in dense(folder).named_parameters() if "layers.0" in name and
                        name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))])  # fmt: skip
    alone = {"target_modules": ["q_proj"], "param_ratio": None, "rank": 20}
    models = [factorize(dense(folder), config_for(folder, method, **alone)) for method in (ALONE, JOINT)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    together = factorize(dense(folder), config_for(folder, JOINT, target_modules=QKV, param_ratio=None, rank=20))
    layers = [together.get_submodule(f"model.layers.0.self_attn.{leaf}") for leaf in QKV]
    gram = collect_statistics(dense(folder), [llama[1]()], method=ALONE).get(
        "model.layers.0.self_attn.q_proj", ["input_gram"]
    )
    stacked = METHODS["compot"]().factorize(weight, 20, gram)
    found = torch.cat([layer.exact_weight() for layer in layers])
    torch.testing.assert_close(found, stacked.product(), rtol=1e-4, atol=1e-5)


def test_a_dictionary_of_more_atoms_than_one_layer_has_rows(llama):
    folder, inputs = llama
    options = {"target_modules": QKV, "param_ratio": None, "rank_pattern": {"q_proj": 40}, "rank": 40}
    model = factorize(dense(folder), config_for(folder, JOINT, **options))
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert (layer.rank, layer.out_features, layer.nonzeros) == (40, 32, 20)
    assert torch.isfinite(logits(model, inputs)).all()
    with pytest.raises(RankError, match=r"rank=41 of a dictionary must be an integer in 1\.\.40"):
        DenseSparseLinear(40, 32, 41)


@pytest.mark.parametrize("method", [ALONE, BOTH])
def test_training_moves_dictionaries_and_values_and_no_support(llama, tmp_path, method):
    folder, inputs = llama
    model = factorize(dense(folder), config_for(folder, method)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer, batch, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), inputs(), []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith((".mask", ".indices"))
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


def test_gradients_are_those_of_the_dense_map():
    """d values = (G D^T) on the support, d D = S^T G summed over the layers, d x = g W, with G = g^T x."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 10, generator=generator, dtype=torch.float64)
    table[table.abs() < table.abs().median(dim=1, keepdim=True).values] = 0
    table[torch.arange(30), table.abs().argmin(1)] = 0
    atoms = make_weight(10, 24)
    nonzeros = int((table != 0).sum(1).max())
    layout = {"nonzeros": nonzeros}
    layers = [DenseSparseLinear.from_factors(Factors(part, atoms, 0.0, layout=layout), dtype=torch.float64)
              for part in table.split(15)]  # fmt: skip
    layers[1].borrow(layers[0])
    x = torch.randn(7, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    (torch.cat([layer(x) for layer in layers], dim=1) * weight).sum().backward()
    dense_gradient = weight.T @ x.detach()
    for layer, gradient in zip(layers, dense_gradient.split(15), strict=True):
        full = gradient @ atoms.T
        chosen = torch.stack([full[i, _support(layer)[i]] for i in range(15)])
        torch.testing.assert_close(layer.values.grad, chosen, rtol=1e-10, atol=1e-12)
        assert {name for name, _ in layer.named_parameters()} <= {"values", "dictionary.weight"}
    torch.testing.assert_close(layers[0].dictionary.weight.grad, table.T @ dense_gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, weight @ table @ atoms, rtol=1e-10, atol=1e-12)


def _support(layer):
    values = torch.ones_like(layer.values)
    marked = torch.func.functional_call(_Codes(layer), {"layer.values": values}, ())
    return [row.nonzero()[:, 0] for row in marked]


class _Codes(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.codes()


def test_copies_share_among_themselves_and_a_merge_takes_a_layer_out(llama):
    folder, inputs = llama
    model = factorize(dense(folder), config_for(folder, JOINT))
    before = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)
    attention = twin.model.layers[0].self_attn
    assert attention.k_proj.basis is attention.q_proj.dictionary
    assert attention.k_proj.basis is not model.model.layers[0].self_attn.q_proj.dictionary
    others = [attention.k_proj.dense_weight().detach(), attention.v_proj.dense_weight().detach()]
    wide = attention.q_proj.exact_weight()
    peers = [attention.k_proj, attention.v_proj]
    with pytest.warns(UserWarning, match="Layers that share a basis no longer do"):
        absorb(attention.q_proj, 2 * wide, peers=peers)
    torch.testing.assert_close(attention.q_proj.exact_weight(), 2 * wide, rtol=1e-5, atol=1e-5)
    assert attention.v_proj.basis is attention.k_proj.dictionary
    assert all(torch.equal(layer.dense_weight(), weight) for layer, weight in zip(peers, others, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": "model.layers.7.self_attn.q_proj"}, r"k_proj borrows the basis of 'model\.layers\.7"),
        ({"basis": "model.layers.0.self_attn.v_proj"}, "cannot borrow the basis of DenseSparseLinear"),
        ({"rank": 5, "nonzeros": 2}, "cannot borrow the basis of a layer of"),
        ({"blocks": 2}, "`blocks`=2 of a dense_sparse layer must be an integer in 1..1"),
    ],
)
def test_a_damaged_config_is_a_checkpoint_error(llama, tmp_path, change, message):
    folder, _ = llama
    factorize(dense(folder), config_for(folder, JOINT)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["modules"]["model.layers.0.self_attn.k_proj"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dictionary_is_stored_by_its_first_layer_alone(llama, tmp_path):
    folder, _ = llama
    factorize(dense(folder), config_for(folder, BOTH)).save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "dictionary" in name]
    leaves = {name.removeprefix("model.layers.0.").removesuffix(".dictionary.weight") for name in names}
    assert leaves == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    with pytest.raises(LowRankError, match="which it has not been given"):
        DenseSparseLinear(8, 8, 4, borrows=True)(torch.zeros(8))


def test_what_needs_inputs_or_another_format_is_refused(llama):
    folder, _ = llama
    with pytest.raises(CalibrationError, match="`calibration` is None"):
        factorize(dense(folder), LowRankConfig(method="compot", calibration=None))
    with pytest.raises(ConfigError, match="`format`='low_rank' cannot hold what `method`='cospadi' makes"):
        LowRankConfig(method="cospadi", format="low_rank")
