"""What every format promises."""

import copy
import json
import os
import tempfile

import torch
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, ComputedWeightError
from ..formats import FORMATS
from ..methods import Factors
from .matrices import make_weight


def check_format(format, rows=24, columns=40, rank=8, make=None):
    """Assert the laws of formats on `format`, a class.

    `make(rows, columns, rank)` gives other [`Factors`] to store than a truncated SVD, for formats that hold more than
    two dense factors; at full rank, those of `make_weight(rows, columns)`.

    `forward` is the dense map; gradients are right; `spec` and the state dict rebuild the same bits, from disk too;
    `cost`, `stored_bytes` and `tensors` are what is stored, integers included; the lowest and the full rank work;
    casts work, and so does autocast; `weight` is read-only and has the layout of the replaced layer; `factors`
    multiply to it; `output_rows` and `input_columns` are just that; integers that cannot be meant are refused.
    """
    assert FORMATS[format.name] is format
    make = make or _factors
    factors = make(rows, columns, rank)
    for bias in (torch.linspace(-1, 1, rows, dtype=torch.float64), None):
        for transposed in (False, True):
            layer = format.from_factors(factors, bias, torch.float64, transposed=transposed)
            torch.testing.assert_close(layer.dense_weight(), factors.product(), rtol=0, atol=1e-12)
            _check_forward(layer, rows, columns, bias)
            _check_round_trip(format, layer, bias is not None, transposed)
            _check_weight(layer, transposed)
            _check_channels(layer)
            _check_damage(layer)
    assert len(layer.state_dict()) <= format.tensors
    stored = sum(tensor.numel() for tensor in layer.state_dict().values())
    assert stored == format.cost(rows, columns, rank, **factors.layout)
    size = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert size == format.stored_bytes(rows, columns, rank, torch.float64.itemsize, **factors.layout)
    edge = format.break_even(rows, columns, lambda *shape: make(*shape).layout)
    costs = {at: format.cost(rows, columns, at, **make(rows, columns, at).layout) for at in (edge - 1, edge) if at}
    assert edge > min(rows, columns) or costs[edge] >= rows * columns
    assert edge == 1 or costs[edge - 1] < rows * columns
    full = min(rows, columns)
    for extreme in (1, full):
        layer = format.from_factors(make(rows, columns, extreme), None, torch.float64)
        _check_forward(layer, rows, columns, None)
        _check_round_trip(format, layer, False, False)
    torch.testing.assert_close(layer.dense_weight(), make_weight(rows, columns), rtol=0, atol=1e-12)
    low = format.from_factors(factors, None, torch.bfloat16)
    assert low(torch.randn(2, columns, dtype=torch.bfloat16)).dtype == torch.bfloat16
    single = format.from_factors(factors, torch.ones(rows), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert single(torch.randn(2, columns)).dtype == torch.bfloat16


def _factors(rows, columns, rank):
    weight = make_weight(rows, columns)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Factors(u[:, :rank] * s[:rank], v[:rank], 0.1)


def _check_forward(layer, rows, columns, bias):
    x = torch.randn(3, 5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = x @ layer.dense_weight().T + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    small = x[0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, (small,))
    # Shapes seen before would otherwise count towards the compiler's limit of recompilations.
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def _check_round_trip(format, layer, bias, transposed):
    spec = json.loads(json.dumps(layer.spec()))
    assert spec["format"] == format.name
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layer.safetensors")
        save_file(layer.state_dict(), path)
        again = format.from_spec(
            spec,
            layer.in_features,
            layer.out_features,
            bias,
            transposed=transposed,
            device="meta",
            dtype=torch.float64,
        )
        again.load_state_dict(load_file(path), assign=True, strict=True)
    state = layer.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    # Kernels may sum in an order that depends on the address of the tensors.
    torch.testing.assert_close(again(x), layer(x), rtol=1e-13, atol=1e-14)
    assert (layer.bias is None) == (not bias)


def _check_damage(layer):
    """Integers that cannot be meant are noticed, and those that are meant are not."""
    layer.check_integers("a.layer")
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            continue
        meant = tensor.clone()
        tensor.fill_(torch.iinfo(tensor.dtype).max)
        try:
            layer.check_integers("a.layer")
        except CheckpointError as error:
            assert f"`{name}` of a.layer" in str(error)
        else:
            raise AssertionError(f"{layer.name} takes any `{name}`.")
        tensor.copy_(meant)


def _check_channels(layer):
    x = torch.randn(3, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rows, columns = torch.arange(layer.out_features).flip(0), torch.arange(layer.in_features).flip(0)
    for names, order, dimension in ((layer.output_rows, rows, 0), (layer.input_columns, columns, 1)):
        if not names:
            continue
        changed = copy.deepcopy(layer)
        for name, tensor in changed.state_dict(keep_vars=True).items():
            if name in names:
                tensor.data = tensor.data.index_select(dimension, order)
        expected = layer(x)[:, rows] if dimension == 0 else layer(x[:, columns])
        torch.testing.assert_close(changed(x), expected, rtol=1e-13, atol=1e-14)


def _check_weight(layer, transposed):
    dense = layer.dense_weight()
    expected = dense.T if transposed else dense
    assert isinstance(layer.weight, torch.Tensor)
    assert layer.weight.shape == expected.shape
    assert layer.weight.dtype == expected.dtype
    torch.testing.assert_close(layer.weight + 0, expected)
    (layer.weight.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in layer.named_parameters() if name != layer.bias_name)
    layer.zero_grad()
    (left, right), rest = layer.factors(), layer.rest()
    torch.testing.assert_close(left @ right + (0 if rest is None else rest), dense.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.exact_weight(), dense.detach(), rtol=0, atol=1e-12)
    assert torch.equal(layer.weight.data + 0, expected.detach())
    assert not (layer.weight.data + 0).requires_grad
    writes = (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.mul_(2),
        lambda: layer.weight.data.copy_(expected),
        lambda: layer.weight.data.__setitem__(0, 1.0),
        lambda: setattr(layer.weight, "data", expected),
    )
    for write in writes:
        try:
            write()
        except ComputedWeightError:
            continue
        raise AssertionError("writing into `weight` of a factorized layer must raise, since it would be lost")
