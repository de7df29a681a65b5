"""An adapter that is saved gives the same output wherever it is loaded."""

import os
import subprocess
import sys
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM

from ._adapters import CLOSE, adapter_base, fill, logits


FRESH = """
import importlib, os, torch
importlib.import_module({module!r})
import peft
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(os.path.join({folder!r}, "base"))
model = peft.PeftModel.from_pretrained(model, os.path.join({folder!r}, "adapter"))
with torch.no_grad():
    logits = model(**torch.load(os.path.join({folder!r}, "inputs.pt"))).logits
torch.save(logits, os.path.join({folder!r}, "logits.pt"))
"""


def check_saving(base, config_cls, options):
    """By PEFT, by transformers, under another name, and in a process of its own; `base` is for [`adapter_base`]."""
    config = config_cls(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with tempfile.TemporaryDirectory() as folder:
        where, adapter = os.path.join(folder, "base"), os.path.join(folder, "adapter")
        model, inputs = adapter_base(*base)
        model.save_pretrained(where)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(where), config)
        fill(model, config)
        adapted = logits(model, inputs)
        model.save_pretrained(adapter)
        torch.save(inputs, os.path.join(folder, "inputs.pt"))
        for low_cpu_mem_usage in (False, True):
            again = peft.PeftModel.from_pretrained(
                adapter_base(*base)[0], adapter, low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert torch.equal(logits(again, inputs), adapted)
            assert not any(p.requires_grad for p in again.parameters())
        # Another name, beside an adapter that is there.
        again.load_adapter(adapter, "other")
        again.set_adapter("other")
        assert torch.equal(logits(again, inputs), adapted)
        assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter), inputs), adapted)
        # transformers' own loading, without a PeftModel.
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter), inputs), adapted)
        alone, before = adapter_base(*base)[0], logits(adapter_base(*base)[0], inputs)
        alone.load_adapter(adapter)
        assert torch.equal(logits(alone, inputs), adapted)
        alone.delete_adapter("default")
        assert torch.equal(logits(alone, inputs), before)
        code = FRESH.format(module=config_cls.__module__, folder=folder)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(os.path.join(folder, "logits.pt")), adapted, **CLOSE)
