"""Where a number comes from: versions, command, model, recipe."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def environment():
    """Versions and processor, to stand beside every result."""
    names = ("hf-lowrank", "torch", "transformers", "accelerate", "safetensors")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in names},
    }


def command():
    """The command line of this process, as typed after `python`."""
    return shlex.join(["python", *sys.argv])


def describe(model):
    """JSON that says which model this is and, where it is known, how it was made."""
    path = getattr(model, "name_or_path", "")
    described = {
        # Of a folder, its name: where it lies says nothing to anyone else.
        "name": Path(path).name if os.path.isdir(path) else path,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        plain = quantization if isinstance(quantization, dict) else quantization.to_dict()
        described["quantization"] = {key: plain[key] for key in ("quant_method", "recipe", "inner") if key in plain}
    return described
