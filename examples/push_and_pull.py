"""Factorize a model, push it to the Hub with what it cost in its card, and pull it where nobody imports hf_lowrank.

    python examples/push_and_pull.py REPOSITORY [--model MODEL] [--param-ratio 0.9] [--private] [--smoke]

Log in first (`hf auth login`), or set HF_TOKEN. Weights, tokenizer and card arrive in one commit, or nothing does.
"""

import argparse
import os
import subprocess
import sys
import tempfile


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.setups import english, smollm2, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig


# What somebody else runs; that the package is installed is enough.
PULL = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "hf_lowrank" not in sys.modules
_, repository, logits = sys.argv
tokenizer = AutoTokenizer.from_pretrained(repository)
model = AutoModelForCausalLM.from_pretrained(repository)
inputs = tokenizer("The capital of France is", return_tensors="pt")
inputs.pop("token_type_ids", None)
with torch.no_grad():
    save_file({"logits": model(**inputs).logits}, logits)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))
"""


def main():
    """Push, pull, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="where to push, such as me/model-lowrank")
    parser.add_argument("--model", help="a folder or a repository; SmolLM2-135M-Instruct by default")
    parser.add_argument("--param-ratio", type=float, default=0.9, help="fraction of the linears' parameters kept")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, folder)


def run(arguments, folder):
    """Everything, with a folder for what is temporary."""
    where = arguments.model or (tiny(f"{folder}/tiny") if arguments.smoke else smollm2()[0])
    tokenizer = AutoTokenizer.from_pretrained(where)
    window, windows = (64, 2) if arguments.smoke else (512, 8)
    sizes = {"samples": 4, "length": 32} if arguments.smoke else {}
    # More characters than these tokens can have.
    text = english()[: windows * window * 16]

    def measure(model):
        task = hf_lowrank.PerplexityTask(text, window=window, max_windows=windows)
        return hf_lowrank.evaluate(model, tokenizer, perplexity={"Python's language reference": task})

    load = AutoModelForCausalLM.from_pretrained
    before = measure(load(where))
    config = LowRankConfig(param_ratio=arguments.param_ratio, calibration=Calibration(**sizes))
    model = load(where, lowrank_config=config)
    after = measure(model)
    card = hf_lowrank.model_card(model, arguments.repository, evaluation=after, dense=before)
    private = arguments.private or None
    commit = model.push_to_hub(arguments.repository, tokenizer=tokenizer, model_card=card, private=private)
    print(f"pushed: {commit.commit_url}\n{hf_lowrank.summary(model).line}")

    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"]).logits
    pulled = f"{folder}/logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", PULL, arguments.repository, pulled], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    print(f"pulled, it says: {done.stdout.strip()}")
    same = torch.equal(load_file(pulled)["logits"], expected)
    print(f"logits of the pulled model equal, bit for bit: {same}")
    if not same:
        raise SystemExit("the pulled model differs from the one that was pushed")


if __name__ == "__main__":
    main()
