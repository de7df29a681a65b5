"""Where a number comes from: versions, command, model, recipe."""

import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

from .versions import versions


# What a token of the Hub looks like.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def environment():
    """Versions and processor, to stand beside every result."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def command():
    """The command line of this process, as typed after `python`; results are published, so it keeps no secrets.

    Tokens of the Hub are masked, and of an absolute path its last part stays.
    """
    given = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv]
    return TOKEN.sub("hf_***", shlex.join(["python", *given]))


def describe(model):
    """JSON that says which model this is and, where it is known, how it was made; `model` may be any module."""
    path = getattr(model, "name_or_path", "")
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    described = {
        # Of a folder, its name: where it lies says nothing to anyone else.
        "name": Path(path).name if os.path.isdir(path) else path,
        "class": type(model).__name__,
        "dtype": str(next(dtypes, None)).removeprefix("torch."),
    }
    quantization = next(filter(None, map(_quantization, model.modules())), None)
    if quantization is not None:
        plain = quantization if isinstance(quantization, dict) else quantization.to_dict()
        described["quantization"] = {key: plain[key] for key in ("quant_method", "recipe", "inner") if key in plain}
    return described


def _quantization(module):
    return getattr(getattr(module, "config", None), "quantization_config", None)
