"""Exported models hold factors, each once and none multiplied out, and compute what the model computes."""

import functools
import sys
from collections import Counter

import pytest
import torch
from processes import run
from safetensors.torch import load_file

import hf_lowrank
from hf_lowrank import FORMATS, FormatLinear, LowRankConfig, factorize
from hf_lowrank.testing import tiny_model


GROUPS = {"bert": ["query", "key", "value"], "llama": ["q_proj", "k_proj", "v_proj"]}
CASES = [(name, format) for name in GROUPS for format in FORMATS.names()]


@functools.cache
def made(name, format):
    """`(model, inputs, logits)`: an encoder or a causal language model with factors of one format."""
    model, inputs = tiny_model(name)
    model.config.use_cache = False
    method = "svd"
    if format == "shared_basis":
        method = {"name": "basis_sharing", "share_layers": 1, "joint_groups": [GROUPS[name]]}
    factorize(model, LowRankConfig(method=method, format=format, param_ratio=0.5, calibration=[inputs()]))
    lenders = {layer.lender for layer in model.modules() if hasattr(layer, "lender")}
    assert (len(lenders) > 1) == (format == "shared_basis")
    with torch.no_grad():
        return model, inputs(), model(**inputs()).logits


def test_without_the_exporters_packages_the_cure_is_named(monkeypatch):
    for name in ("onnx_ir", "onnx_ir.passes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(hf_lowrank.MissingPackageError, match=r"pip install 'hf-lowrank\[export\]'"):
        hf_lowrank.share_initializers(None)


def matrices(tensors):
    """How many matrices of each shape there are, whichever way round they are stored."""
    return Counter(tuple(sorted(shape)) for shape in (tuple(map(int, t.shape)) for t in tensors) if len(shape) == 2)


def weights(model):
    """Its parameters, those that are tied once for every place: exporters write each in the layout of its place."""
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


def numbers(model):
    return sum(p.numel() for p in weights(model))


@pytest.mark.parametrize(("name", "format"), CASES)
def test_onnx(name, format, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'hf-lowrank[export]'")
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    model, inputs, logits = made(name, format)
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    hf_lowrank.share_initializers(exported).save_pretrained(tmp_path)
    session = ExportedModel.from_pretrained(tmp_path)
    torch.testing.assert_close(session(**inputs).logits, logits, rtol=0, atol=1e-5)
    longer = {key: torch.cat([value, value], dim=1) for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(session(**longer).logits, model(**longer).logits, rtol=0, atol=1e-5)
    holds_the_factors(model, tmp_path)
    quantized_to_int8(model, inputs, logits, tmp_path)


def holds_the_factors(model, folder):
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    found = [t for t in stored.values() if t.dtype.kind == "f"]
    assert matrices(found) == matrices(weights(model))
    assert sum(t.size for t in found) < 1.02 * numbers(model)
    # Beside parameters there are orders of channels, as 64-bit integers, and small constants.
    orders = sum(8 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("order"))
    size = (folder / "model.onnx.data").stat().st_size
    assert size < 1.05 * (4 * numbers(model) + orders) + 4096
    # Each is multiplied with its input once, a shared basis too; some formats have matrices that are no linear layers.
    products = [stored[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored]
    linears = matrices(m.weight for m in model.modules() if type(m) is torch.nn.Linear)
    own = [p for m in model.modules() if isinstance(m, FormatLinear) for p in m.parameters(recurse=False)]
    assert linears <= matrices(products) <= linears + matrices(own)


def quantized_to_int8(model, inputs, logits, folder):
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(folder / "model.onnx", folder / "int8.onnx")
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "int8.onnx").graph.initializer]
    linears = matrices(m.weight for m in model.modules() if type(m) is torch.nn.Linear)
    assert linears <= matrices([t for t in stored if t.dtype.itemsize == 1]) <= matrices(weights(model))
    session = InferenceSession(folder / "int8.onnx")
    found = session.run(None, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})[0]
    assert (torch.from_numpy(found) - logits).norm() < 0.1 * logits.norm()


@pytest.mark.parametrize(("name", "format"), CASES)
def test_torch_export(name, format, tmp_path):
    model, inputs, logits = made(name, format)
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert matrices(program.parameters()) == matrices(weights(model))
    assert sum(p.numel() for p in program.parameters()) == numbers(model)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "format"), [("bert", "pivoted"), ("llama", "low_rank"), ("llama", "shared_basis")])
def test_openvino(name, format, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    from transformers.exporters import ExportedModel, OpenVINOConfig, OpenVINOExporter

    model, inputs, logits = made(name, format)
    program = OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic=True))
    program.save_pretrained(tmp_path)
    found = ExportedModel.from_pretrained(tmp_path)(**inputs).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=5e-3)
    constants = [op for op in program.program.get_ops() if op.get_type_name() == "Constant"]
    floats = [op.output(0) for op in constants if op.get_element_type().is_real()]
    shapes = matrices([torch.empty(list(value.shape), device="meta") for value in floats])
    assert shapes == matrices(model.parameters())
    assert next(tmp_path.glob("*.bin")).stat().st_size < 1.2 * 4 * numbers(model)


DENSE = """
import sys, torch
from transformers import AutoModelForCausalLM
saved = torch.load({saved!r})
model, info = AutoModelForCausalLM.from_pretrained({folder!r}, output_loading_info=True)
assert not any(info.values()), info
assert torch.equal(model(**saved["inputs"]).logits, saved["logits"])
assert "hf_lowrank" not in sys.modules
"""


@pytest.mark.parametrize("format", FORMATS.names())
def test_a_dense_export_is_what_converters_read(format, tmp_path):
    """Same names, shapes and dtypes as the checkpoint of the architecture, and nothing in its config but that."""
    name = "llama"
    dense, _ = tiny_model(name)
    dense.config.use_cache = False
    dense.save_pretrained(tmp_path / "original")
    model, inputs, logits = made(name, format)
    made.cache_clear()
    hf_lowrank.to_dense(model).save_pretrained(tmp_path / "dense")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("original", "dense")]
    assert [{key: (t.shape, t.dtype) for key, t in file.items()} for file in files[:1]] == [
        {key: (t.shape, t.dtype) for key, t in file.items()} for file in files[1:]
    ]
    assert (tmp_path / "dense/config.json").read_text() == (tmp_path / "original/config.json").read_text()
    with torch.no_grad():
        multiplied = model(**inputs).logits
    torch.testing.assert_close(multiplied, logits, rtol=0, atol=1e-5)
    torch.save({"inputs": inputs, "logits": multiplied}, tmp_path / "saved.pt")
    code = DENSE.format(saved=str(tmp_path / "saved.pt"), folder=str(tmp_path / "dense"))
    done = run(code, HF_LOWRANK_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
