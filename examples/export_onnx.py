"""Factorize a model, export it to ONNX, and run it in ONNX Runtime: as factors, and as factors in int8.

    python examples/export_onnx.py [--model NAME] [--architecture AutoModel] [--param-ratio 0.6] [--format low_rank]
                                   [--output FOLDER] [--smoke]

Needs `pip install "hf-lowrank[export]"`. By default the model is all-MiniLM-L6-v2, an encoder; a causal language model
is exported as it computes a whole text, without a cache.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from benchmarks.setups import english, minilm
from onnxruntime import InferenceSession
from onnxruntime.quantization import quantize_dynamic
from transformers.exporters import OnnxConfig, OnnxExporter

from hf_lowrank import LowRankConfig, factorize, share_initializers, summary
from hf_lowrank.testing import tiny_model


def setup(arguments):
    """`(model, inputs, config)`: a dense model, a batch for it, and how to factorize it."""
    if arguments.smoke:
        model, inputs = tiny_model("bert")
        return model, inputs(), LowRankConfig(method="svd", param_ratio=0.5, format=arguments.format)
    where = arguments.model or minilm()
    model = getattr(transformers, arguments.architecture).from_pretrained(where, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    texts = english().split("\n\n")
    inputs = tokenizer(texts[0], return_tensors="pt", truncation=True, max_length=128)
    config = LowRankConfig(
        method="whitened_svd", param_ratio=arguments.param_ratio, format=arguments.format, calibration=texts[1:257]
    )
    return model, dict(inputs), config


def export(model, inputs, folder):
    """Write `model` as `folder/model.onnx`."""
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    share_initializers(exported).save_pretrained(folder)
    return folder / "model.onnx"


def size(path):
    """Bytes of an ONNX file and of the weights beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def run(path, inputs, times=9):
    """`(first output, median milliseconds)` in ONNX Runtime."""
    session = InferenceSession(path)
    feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        output = session.run(None, feed)[0]
        taken.append(1000 * (time.perf_counter() - started))
    return torch.from_numpy(output), statistics.median(taken)


def main():
    """Export, run, and print sizes, times and differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder; all-MiniLM-L6-v2 by default")
    parser.add_argument("--architecture", default="AutoModel", help="class of transformers that loads it")
    parser.add_argument("--param-ratio", type=float, default=0.6, help="fraction of the linears' parameters kept")
    parser.add_argument("--format", default="low_rank", help="how factors are stored")
    parser.add_argument("--output", type=Path, help="folder to keep the files in")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    arguments = parser.parse_args()
    model, inputs, config = setup(arguments)
    model.config.use_cache = False

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        rows = [("", "MiB", "ms", "largest difference to PyTorch")]

        def add(label, path, expected):
            found, milliseconds = run(path, inputs)
            difference = (found - expected).abs().max().item()
            rows.append((label, f"{size(path) / 2**20:.2f}", f"{milliseconds:.1f}", f"{difference:.1e}"))
            return difference

        with torch.no_grad():
            expected = model(**inputs)[0]
        add("dense", export(model, inputs, folder / "dense"), expected)
        factorize(model, config)
        with torch.no_grad():
            expected = model(**inputs)[0]
        path = export(model, inputs, folder / "factors")
        difference = add("factors", path, expected)
        quantized = folder / "int8" / "model.onnx"
        quantized.parent.mkdir(exist_ok=True)
        quantize_dynamic(path, quantized)
        add("factors in int8", quantized, expected)

    print(f"\n{summary(model).line}\n")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    if difference > 1e-3:
        raise SystemExit("the exported model differs from the one it was made from")


if __name__ == "__main__":
    main()
