"""Peak memory of factorizing a checkpoint into another one, beside the bytes of the checkpoint.

    PYTHONPATH=examples python examples/benchmarks/out_of_core_memory.py

Makes a random Llama-shaped bfloat16 checkpoint of more than 1.5 GB in files of 200 MB, factorizes it with
`factorize_checkpoint` in a fresh process, and prints the peak of its anonymous memory: all of it, libraries included,
and what the call adds to these. Ranks are set, so that time goes into reading, decomposing and writing every weight,
not into the quality of random numbers. Fails if all of it is above a quarter of the checkpoint; writes
results/out_of_core.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import metrics
from hf_lowrank import LowRankConfig, factorize_checkpoint


CONFIG = LlamaConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=82,
    vocab_size=16384,
    num_attention_heads=12,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)
LAYERS, SHARD, ALLOWED = CONFIG.num_hidden_layers, 200 * 10**6, 0.25


def make(folder, layers):
    """Write the checkpoint file by file, as little in memory as the benchmark allows."""
    CONFIG.num_hidden_layers, CONFIG.dtype = layers, "bfloat16"
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG)
    generator = torch.Generator().manual_seed(0)
    shards, size = [{}], 0
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        if size + tensor.nbytes > SHARD:
            write(folder, shards)
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    write(folder, shards)
    names = {name: file(index, len(shards)) for index, shard in enumerate(shards) for name in shard}
    for index in range(len(shards)):
        os.rename(folder / file(index), folder / file(index, len(shards)))
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def file(index, count=0):
    """The name of a weight file."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def write(folder, shards):
    """Write the last of the shards, and keep no more of it than its names."""
    save_file(shards[-1], folder / file(len(shards) - 1), metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1])


def factorize(folder, rank):
    """Factorize in this process, and print the measurement as JSON."""
    # The first use of the solver loads libraries that stay; they are not the work's.
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    started = time.perf_counter()
    with metrics.PeakMemory("RssAnon") as memory:
        made = factorize_checkpoint(folder / "dense", folder / "small", LowRankConfig(method="svd", rank=rank))
    seconds = time.perf_counter() - started
    total = memory.start + memory.peak
    print(json.dumps({"peak": memory.peak, "total_peak": total, "seconds": seconds, "line": made.summary.line}))


def main():
    """Make the checkpoint, factorize it in a process of its own, and hold the peak against its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model")
    parser.add_argument("--rank", type=int, default=64, help="of every factorized weight")
    parser.add_argument("--factorize", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.factorize:
        factorize(Path(arguments.factorize), arguments.rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        dense.mkdir()
        make(dense, arguments.layers)
        sizes = [path.stat().st_size for path in dense.glob("*.safetensors")]
        command = [sys.executable, __file__, "--factorize", folder, "--rank", str(arguments.rank)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result = {
        "checkpoint_bytes": sum(sizes),
        "files": len(sizes),
        "rank": arguments.rank,
        "allowed": ALLOWED,
        **result,
    }
    for name in ("peak", "total_peak"):
        result[f"{name}_share"] = result[name] / result["checkpoint_bytes"]
    print(f"checkpoint {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} files, bfloat16: {result['line']}")
    print(
        f"anonymous memory: {result['total_peak'] / 2**20:.0f} MiB at most, {result['total_peak_share']:.1%} of it; "
        f"{result['peak'] / 2**20:.0f} MiB ({result['peak_share']:.1%}) more than before; {result['seconds']:.0f} s"
    )
    if arguments.layers == LAYERS:
        metrics.write("out_of_core", result)
    if result["total_peak_share"] > ALLOWED:
        raise SystemExit(f"more than {ALLOWED:.0%} of the checkpoint's size")


if __name__ == "__main__":
    main()
