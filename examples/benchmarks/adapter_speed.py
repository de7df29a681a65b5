"""How long a training step takes with adapters of equal trainable parameters, as ratios to LoRA within one run.

    PYTHONPATH=examples python examples/benchmarks/adapter_speed.py [--tiny]

Every linear of SmolLM2-135M's blocks gets an adapter. Prints the time of a step (forward, backward, AdamW) and the
bytes that autograd keeps between forward and backward, over LoRA's. Writes results/adapter_speed.json; `--tiny` runs a
random two-layer model and writes nothing.
"""

import argparse
import copy
import os
import statistics
import time


os.environ.setdefault("OMP_NUM_THREADS", "2")

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import metrics, setups
from hf_lowrank import WaraConfig
from hf_lowrank.testing import tiny_model


REPEATS, SAMPLES, LENGTH = 7, 4, 128
# r (out + in) parameters a weight of LoRA; WaRA takes r (out + in) for each of its bands, or half of it if shared.
# Two levels have three bands: 2 for each of them, and 2 more for each on the diagonal, make 8.
DIAGONAL = {"L:L": 4, "H1:H1": 4, "H2:H2": 4}
VARIANTS = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"),
    "wara": lambda: WaraConfig(r=4),
    "wara, db4": lambda: WaraConfig(r=4, wavelet="db4"),
    "wara, two levels": lambda: WaraConfig(r=2, levels=2, subband_ranks=DIAGONAL),
    "wara, db4, two levels": lambda: WaraConfig(r=2, levels=2, wavelet="db4", subband_ranks=DIAGONAL),
    "wara, db4, shared": lambda: WaraConfig(r=16, wavelet="db4", share_subbands=True),
}


def adapted(dense, make):
    """A copy of `dense` that shares its weights, with adapters, and an optimizer for them."""
    model = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    model = peft.get_peft_model(model, make()).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model, optimizer, ids):
    """One step of training."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def kept(model, ids):
    """Bytes of the tensors that autograd keeps for the backward pass, the model's own excepted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(found.values())


def main():
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(2)
    if tiny:
        dense, inputs = tiny_model("llama")
        name, ids = "a random tiny Llama", inputs()["input_ids"]
    else:
        where, name = setups.smollm2()
        text = AutoTokenizer.from_pretrained(where)(setups.english(), return_tensors="pt")
        ids = text["input_ids"][0, : SAMPLES * LENGTH].view(SAMPLES, LENGTH)
        dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    models = {label: adapted(dense, make) for label, make in VARIANTS.items()}
    seconds = {label: [] for label in models}
    for repeat in range(REPEATS + 1):
        # In turn, so that whatever else the machine does hits all alike; the first round only warms up.
        for label, (model, optimizer) in models.items():
            started = time.perf_counter()
            step(model, optimizer, ids)
            if repeat:
                seconds[label].append(time.perf_counter() - started)
    result = {"model": name, "tokens": ids.numel(), "over_lora": {}}
    measured = {
        label: {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": statistics.median(seconds[label]),
            "bytes": kept(model, ids),
        }
        for label, (model, _) in models.items()
    }
    print(f"{'over LoRA at r = 8':<22} {'parameters':>10} {'step':>6} {'memory':>7}")
    for label, numbers in measured.items():
        ratios = {key: value / measured["lora"][key] for key, value in numbers.items()}
        result["over_lora"][label] = ratios
        print(f"{label:<22} {ratios['parameters']:>10.3f} {ratios['seconds']:>6.3f} {ratios['bytes']:>7.3f}")
    if not tiny:
        metrics.write("adapter_speed", result)


if __name__ == "__main__":
    main()
