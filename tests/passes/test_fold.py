"""The order of pivoted layers goes into their neighbours: same outputs, fewer gathers, and nothing is ever broken."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import hf_lowrank
from hf_lowrank import FORMATS, LowRankConfig, LowRankError, PivotedLinear, factorize, fold_order, summary, to_dense
from hf_lowrank.methods import Factors
from hf_lowrank.testing import ARCHITECTURES, tiny_model


# Gathers that go: one for each MLP; of gate and up, one. Phi-3 computes gate and up in one linear and splits it; the
# experts of a mixture are no linears; DeepSeek-V3 has a plain MLP in its first layer, a shared expert in the second.
FOLDED = {
    "llama": 2, "llama_tied": 2, "qwen2": 2, "gpt2": 2, "bert": 2, "t5": 4, "gpt_neox": 2, "vit": 2, "whisper": 4,
    "llava": 4, "deepseek_v3": 2, "phi3": 0, "mixtral": 0, "qwen3_moe": 0, "gpt_oss": 0,
}  # fmt: skip
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


class Gathers(TorchDispatchMode):
    """Counts calls of `gather`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.gather.default
        return func(*args, **(kwargs or {}))


def small(architecture, dtype=torch.float32, **options):
    model, inputs = tiny_model(architecture)
    exclude = [name for name, _ in model.named_modules() if name.endswith(".experts")] or None
    exclude = None if exclude is None else rf"({'|'.join(exclude)})\..*"
    options = {"method": "svd", "param_ratio": 0.5, "rank_multiple": 1, "format": "pivoted", **options}
    model = factorize(model, LowRankConfig(exclude_modules=exclude, **options)).to(dtype)
    if exclude is not None and dtype == torch.float64:
        # The grouped kernel of experts has no double precision.
        model.set_experts_implementation("eager")
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def gathers(model, inputs):
    with Gathers() as seen:
        logits(model, inputs)
    return seen.count


def bare(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, PivotedLinear) and module.pivots_first
    }


def test_every_architecture_is_here():
    assert set(FOLDED) == set(ARCHITECTURES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("architecture", sorted(FOLDED))
def test_same_logits_with_fewer_gathers(architecture, dtype, tolerance):
    model, inputs = small(architecture, dtype)
    before, count, size = logits(model, inputs), gathers(model, inputs), summary(model).bytes
    assert fold_order(model, inputs) == FOLDED[architecture]
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=tolerance)
    assert count - gathers(model, inputs) == len(bare(model)) == FOLDED[architecture]
    assert (summary(model).bytes < size) == (FOLDED[architecture] > 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "whisper", "t5"])
def test_saved_and_loaded_bit_for_bit(architecture, tmp_path):
    model, inputs = small(architecture)
    fold_order(model, inputs)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert bare(again) == bare(model)
    assert str(summary(again)) == str(summary(model))


def test_a_loaded_model_folds_and_a_folded_one_multiplies_out(tmp_path):
    model, inputs = small("llama")
    before = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert fold_order(again, inputs) == 2
    again = to_dense(again)
    assert not any(isinstance(module, PivotedLinear) for module in again.modules())
    torch.testing.assert_close(logits(again, inputs), before, rtol=0, atol=1e-5)


def test_a_second_time_changes_nothing():
    model, inputs = small("llama")
    fold_order(model, inputs)
    state = copy.deepcopy(model.state_dict())
    assert fold_order(model, inputs) == 0
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_parameters_stay_what_they_were():
    model, inputs = small("bert", torch.bfloat16)
    model.train()
    parameters = dict(model.named_parameters())
    frozen = "bert.encoder.layer.0.output.dense.basis.weight"
    parameters[frozen].requires_grad_(False)
    state = torch.get_rng_state()
    assert fold_order(model, inputs) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in model.modules())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {name for name, parameter in after.items() if not parameter.requires_grad} == {frozen}
    assert {parameter.dtype for parameter in after.values()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dispatched_model():
    model, inputs = small("llama")
    before = logits(model, inputs)
    for module in model.modules():
        # What accelerate does to a model on several devices: every forward is replaced.
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert fold_order(model, inputs) == 2
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_unfolded_model():
    model, inputs = small("gpt2", torch.float64)
    folded = copy.deepcopy(model)
    fold_order(folded, inputs)
    layer, other = (m.transformer.h[0].mlp for m in (folded, model))
    for one in (model, folded):
        one(**inputs).logits.square().sum().backward()
    assert torch.allclose(layer.c_fc.basis.weight.grad, other.c_fc.basis.weight.grad, rtol=1e-9)
    order = other.c_fc.order.long()
    assert torch.allclose(layer.c_fc.output_bias.grad[order], other.c_fc.output_bias.grad, rtol=1e-9)
    assert torch.allclose(layer.c_proj.basis.weight.grad[:, order], other.c_proj.basis.weight.grad, rtol=1e-9)
    before = logits(folded, inputs).square().sum()
    torch.optim.SGD(folded.parameters(), lr=1e-4).step()
    assert logits(folded, inputs).square().sum() < before


def pivoted(rows, columns, rank=5, bias=True):
    weight = [torch.randn(rows, rank, dtype=torch.float64), torch.randn(rank, columns, dtype=torch.float64)]
    return FORMATS["pivoted"].from_factors(
        Factors(*weight, 0.0), torch.randn(rows, dtype=torch.float64) if bias else None, torch.float64
    )


def factored(name, rows, columns, rank=5):
    pair = Factors(torch.randn(rows, rank, dtype=torch.float64), torch.randn(rank, columns, dtype=torch.float64), 0.0)
    return FORMATS[name].from_factors(pair, torch.randn(rows, dtype=torch.float64), torch.float64)


def conv1d(rows, columns):
    layer = Conv1D(rows, columns).double()
    nn.init.normal_(layer.bias)
    return layer


class Scale(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x):
        return x * self.values


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Block(nn.Module):
    """`x + second(between(first(x)))`."""

    def __init__(self, first, between, second, outside=None):
        super().__init__()
        self.first, self.between, self.second, self.outside = first, between, second, outside

    def forward(self, x):
        middle = self.first(x)
        if self.outside is not None:
            self.outside(middle)
        return x + self.second(self.between(middle))


class Toy(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def toy(between=None, first=None, second=None, inside=24):
    torch.manual_seed(1)
    first = pivoted(inside, 12) if first is None else first
    second = nn.Linear(inside, 12).double() if second is None else second
    return Toy(Block(first, nn.GELU() if between is None else between, second)).eval()


X = {"x": torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}


def check(model, expected, inputs=X):
    """Fold `model`; whether or not anything is folded, it computes the same, and where nothing is, no bit moves."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(**inputs)
        assert fold_order(model, inputs) == expected
        torch.testing.assert_close(model(**inputs), before, rtol=1e-12, atol=1e-12)
    if expected == 0:
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def norm():
    layer = nn.LayerNorm(24).double()
    layer.weight.data[:12] = 2.0
    return layer


@pytest.mark.parametrize(
    "between",
    [
        norm(),
        Apply(lambda x: x.cumsum(-1)),
        Apply(lambda x: x.cumsum(-2) * torch.arange(24)),
        Apply(lambda x: x.flip(-1)),
        Apply(lambda x: x.unflatten(-1, (6, 4)).softmax(-1).flatten(-2)),
        Scale(torch.linspace(1, 2, 24, dtype=torch.float64)),
        Scale(1 + torch.linspace(0, 1e-3, 24, dtype=torch.float64)),
        Apply(torch.zeros_like),
        Apply(lambda x: x * float("nan")),
    ],
    ids=["norm", "cumsum", "position", "flip", "heads", "scale", "weak scale", "nothing", "nan"],
)
def test_what_depends_on_the_order_is_left_alone(between):
    state = {key: value.clone() for key, value in toy(between).state_dict().items()}
    model = toy(between)
    with torch.no_grad():
        assert fold_order(model, X) == 0
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("inside", [24, 12], ids=["wider", "as wide as the residual"])
@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.Identity(), Apply(lambda x: x.cumsum(-2)), Scale(torch.full((1,), 2.0, dtype=torch.float64))],
    ids=["relu", "identity", "over tokens", "constant"],
)
def test_what_does_not_is_folded(between, inside):
    check(toy(between, inside=inside), 1)


SECOND = {
    "linear": lambda: nn.Linear(24, 12).double(),
    "conv1d": lambda: conv1d(12, 24),
    **{name: lambda name=name: factored(name, 12, 24) for name in FORMATS.names()},
}


@pytest.mark.parametrize("second", SECOND)
def test_every_sort_of_reader(second):
    torch.manual_seed(3)
    check(toy(second=SECOND[second]()), 1)


class Gated(nn.Module):
    def __init__(self, gate, up, down):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", ["linear", "conv1d", *FORMATS.names()])
def test_every_sort_of_layer_beside_it(name):
    torch.manual_seed(3)
    sorts = {"linear": lambda: nn.Linear(12, 24).double(), "conv1d": lambda: conv1d(24, 12)}
    beside = sorts[name]() if name in sorts else factored(name, 24, 12)
    model = Toy(Gated(beside, pivoted(24, 12), nn.Linear(24, 12).double()))
    check(model, 1)
    assert fold_order(model, X) == 0


class Wide(nn.Module):
    """A residual block in which every linear has the same shape."""

    def __init__(self):
        super().__init__()
        self.value, self.output = pivoted(12, 12), pivoted(12, 12)
        self.norm, self.mlp = nn.LayerNorm(12).double(), Gated(*(pivoted(12, 12) for _ in range(3)))

    def forward(self, x):
        x = x + self.output(self.value(x).softmax(-1))
        return x + self.mlp(self.norm(x))


def test_layers_of_one_shape_are_told_apart_by_what_they_reach():
    torch.manual_seed(3)
    model = Toy(Wide(), Wide())
    check(model, 2)
    assert bare(model) == {"blocks.0.mlp.gate", "blocks.1.mlp.gate"}


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.two = pivoted(24, 12), nn.Linear(24, 12).double(), pivoted(12, 24)

    def forward(self, x):
        middle = self.first(x).relu()
        return x + self.one(middle) * self.two(middle).tanh()


def test_two_readers_are_reordered_together():
    check(Toy(TwoReaders()), 1)


class Leak(nn.Module):
    """Gives a layer's outputs away beside the hidden state."""

    def __init__(self):
        super().__init__()
        self.first, self.second = pivoted(24, 12), nn.Linear(24, 12).double()

    def forward(self, x):
        middle = self.first(x)
        return x + self.second(middle.relu()), middle


class Leaking(Toy):
    def forward(self, x):
        return self.blocks[0](x)[1]


def test_outputs_that_leave_the_block_stay_in_order():
    check(Leaking(Leak()), 0)


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (pivoted(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(("heads", "expected"), [(1, 1), (2, 0), (4, 0)])
def test_values_are_folded_into_the_output_of_a_single_head_only(heads, expected):
    torch.manual_seed(5)
    check(Toy(Attention(heads)), expected)


@pytest.mark.parametrize("which", [0, 1], ids=["lender", "borrower"])
def test_a_basis_that_others_read_is_not_reordered(which):
    torch.manual_seed(3)
    lender = factored("shared_basis", 12, 24)
    borrower = factored("shared_basis", 12, 24)
    borrower.borrow(lender)
    pair = (lender, borrower)
    model = toy(second=pair[which])
    model.other = nn.ModuleDict({"reads": pair[1 - which]})
    check(model, 0)


def test_layers_that_lend_and_borrow_can_stand_beside():
    torch.manual_seed(3)
    lender, borrower = factored("shared_basis", 24, 12), factored("shared_basis", 24, 12)
    borrower.borrow(lender)
    model = Toy(Gated(borrower, pivoted(24, 12), nn.Linear(24, 12).double()))
    model.lender = lender
    check(model, 1)


def test_a_tied_reader_is_not_reordered():
    model = toy()
    model.head = nn.Linear(24, 12).double()
    model.head.weight = model.blocks[0].second.weight
    check(model, 0)


def test_a_block_that_stands_twice_is_not_reordered():
    block = toy().blocks[0]
    check(Toy(block, block), 0)


class Other(nn.Linear):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x).sin()


@pytest.mark.parametrize("second", [Other(24, 12).double(), nn.utils.parametrizations.weight_norm(nn.Linear(24, 12))])
def test_readers_of_unknown_sort_are_left_alone(second):
    check(toy(second=second.double()), 0)


def test_an_adapter_on_a_factor_is_respected():
    first = pivoted(24, 12)
    first.coefficients = nn.Sequential(first.coefficients)
    check(toy(first=first), 0)


def test_blocks_that_are_not_reached_and_models_without_pivoted_layers_stay():
    model, inputs = small("llava")
    text = {"input_ids": inputs["input_ids"].clamp(max=80)}
    assert fold_order(model, text) == 2
    assert fold_order(tiny_model("llama")[0], {"input_ids": torch.ones(1, 3, dtype=torch.long)}) == 0
    assert fold_order(nn.Sequential(pivoted(24, 12), nn.Linear(24, 12)), X) == 0


def test_a_lender_outside_the_block_in_half_precision():
    method = {"name": "basis_sharing", "share_layers": 2}
    model, inputs = small("llama", method=method, format="shared_basis", calibration=[tiny_model("llama")[1]()])
    for layer in model.model.layers:
        layer.mlp.up_proj = pivoted(96, 64, bias=False)
    model = model.to(torch.bfloat16)
    assert model.model.layers[1].self_attn.q_proj.lender is not None
    # Both `down_proj` read one basis. Once one of them is gone, the other has it for itself.
    assert fold_order(model, inputs) == 0
    model.model.layers[1].mlp.down_proj = nn.Linear(96, 64, dtype=torch.bfloat16)
    before = logits(model, inputs)
    assert fold_order(model, inputs) == 2
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0.05)


def test_bad_arguments_are_refused():
    model, inputs = small("llama")
    with pytest.raises(hf_lowrank.ConfigError, match="`model` must be a torch.nn.Module, not dict"):
        fold_order({}, inputs)
    for wrong in (inputs["input_ids"], {}, {"input_ids": [1, 2]}):
        with pytest.raises(hf_lowrank.CalibrationError, match="`inputs` must be a dict of tensors"):
            fold_order(model, wrong)
    with pytest.raises(LowRankError, match="meta device"):
        fold_order(model.to("meta"), inputs)


def test_a_failing_run_leaves_the_model_as_it_was():
    model, _ = small("llama")
    model.train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        fold_order(model, {"input_ids": torch.full((1, 3), 10_000)})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.training
    assert not bare(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
