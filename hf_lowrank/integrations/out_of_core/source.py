"""The dense checkpoint: which class it is of, which files hold it, and its tensors one at a time."""

import hashlib
import json
import os
import re
from fnmatch import fnmatch

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ...errors import CheckpointError, ConfigError
from ...files import sha256_of
from ...parts import without_records
from ...plan import FLOATS
from ..checkpoint import stored_keys
from ..from_pretrained import calibrate, loader, rehearse
from ..progress import bar


# What stands beside the weights and is not made anew: tokenizers, processors, chat templates, licences.
BESIDE = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "added_tokens.json",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
    "video_preprocessor_config.json",
    "vocab.*",
)
INSTEAD = "load it with from_pretrained(..., lowrank_config=...) and save it instead"


class Source:
    """A dense checkpoint in a folder or on the Hub.

    Args:
        name (`str`): a folder or a repository.
        dtype (*optional*): as of `from_pretrained`; by default that of the checkpoint.
        revision, token, cache_dir, local_files_only (*optional*): where it is on the Hub; as of `from_pretrained`.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: it is quantized or factorized, or its class is not one of transformers; a dtype that is none.
    """

    def __init__(self, name, dtype=None, revision=None, token=None, cache_dir=None, local_files_only=None):
        check_path("source", name)
        check_dtype(dtype)
        self.name = os.fspath(name)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        self.hub = hub = {key: value for key, value in hub.items() if value is not None}
        config = read_config(self.name, **hub)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"{self.name} is quantized or factorized already; factorize the dense model it was made from."
            )
        self.cls = _class(config, self.name)
        self.digest_of_config = _digest_of(config)
        self._load = loader(self.cls)
        self._options = hub if dtype is None else {**hub, "dtype": dtype}
        self.files = []
        self._where = {}
        self._open = None, None

    def rehearse(self, config):
        """[`Rehearsed`]: what would be loaded with `config`; from then on, the files are known.

        Raises:
            LowRankError: what cannot work, before any weight is read.
        """
        rehearsed = rehearse(self._load, config, (self.name,), self._options)
        if not self.files:
            self._find(rehearsed.files)
        return rehearsed

    def load(self):
        """The dense model; its weights are mapped from the files where their dtype is kept."""
        return self._load(self.name, **self._options)

    def calibrate(self, config, calibration, stack):
        """Give the session of `config` the statistics of the dense model."""
        calibrate(self._load, config, calibration, (self.name,), self._options, stack)

    def _find(self, files):
        other = next((path for path in files if not path.endswith(".safetensors")), None)
        if other is not None:
            raise CheckpointError(f"{other} is not a safetensors file; {INSTEAD}.")
        self._where = {key: path for path in files for key in stored_keys([path])}
        self.files = files
        index = os.path.join(os.path.dirname(files[0]), SAFE_WEIGHTS_INDEX_NAME)
        if len(files) > 1 and os.path.exists(index):
            with open(index, encoding="utf-8") as file:
                promised = json.load(file)["weight_map"]
            for key, name in promised.items():
                if key not in self._where:
                    raise CheckpointError(f"{name} does not hold {key}, which the index promises; download it again.")

    @property
    def keys(self):
        """The names under which tensors are stored."""
        return self._where.keys()

    def read(self, key):
        """A tensor on the CPU, mapped from its file."""
        path, file = self._open
        if path != self._where[key]:
            path = self._where[key]
            file = safe_open(path, "pt")
            self._open = path, file
        return file.get_slice(key)[...]

    def digests(self):
        """`{file name: sha256}`; a file out of the Hub's cache has to have the one that the Hub says.

        Raises:
            CheckpointError: a file that is damaged.
        """
        found = {}
        for path in bar(self.files, "Checking"):
            name, digest = os.path.basename(path), sha256_of(path)
            # The cache names large files by their hash, and links to them.
            promised = os.path.basename(os.path.realpath(path))
            if os.path.islink(path) and re.fullmatch("[0-9a-f]{64}", promised) and promised != digest:
                raise CheckpointError(
                    f"{path} is damaged: its sha256 is {digest}, and the Hub's is {promised}; remove it and download "
                    "it again."
                )
            found[name] = digest
        return found


def check_path(argument, value):
    """Refuse what cannot name a file, a folder or a repository."""
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"`{argument}`={value!r} must be a string or a path.")


def check_dtype(dtype):
    """Refuse what factors cannot be computed in; `None` is the dtype of the checkpoint.

    Raises:
        ConfigError: neither "auto" nor one of `FLOATS`, by name or itself, nor a mapping of parts of a model to these.
    """
    for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
        found = getattr(torch, one, None) if isinstance(one, str) else one
        if one not in (None, "auto") and found not in FLOATS:
            names = [str(allowed).removeprefix("torch.") for allowed in FLOATS]
            raise ConfigError(f"`dtype`={one!r} must be 'auto' or a floating-point dtype of torch, one of {names}.")


def local_folder(name, patterns=("*.safetensors", "*.json", *BESIDE), **hub):
    """`name` if it is a folder, else the copy of that repository in the Hub's cache, files at its top only.

    Raises:
        CheckpointError: there is neither.
    """
    if os.path.isdir(name):
        return os.fspath(name)
    try:
        return snapshot_download(os.fspath(name), allow_patterns=list(patterns), ignore_patterns=["*/*"], **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} is neither a folder nor a repository that can be reached: {error}") from error


def files_beside(name, **hub):
    """Paths of the files of tokenizers and the like in a folder or repository."""
    folder = local_folder(name, BESIDE, **hub)
    found = sorted(os.listdir(folder))
    return [os.path.join(folder, file) for file in found if any(fnmatch(file, pattern) for pattern in BESIDE)]


def read_config(name, **hub):
    """The config of a folder or repository; code that comes with it is not run.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"There is no model that can be read at {name!r}: {error}") from error


def load_model(name, **options):
    """The model in a folder or repository, dense or factorized, of the class that its config names.

    Args:
        name (`str`): a folder or a repository.
        options (*optional*): as of `from_pretrained`.

    Raises:
        CheckpointError: nothing that can be read.
        ConfigError: its class is not one of transformers, or `dtype` is none.
    """
    check_dtype(options.get("dtype"))
    cls = _class(read_config(name), name)
    try:
        return cls.from_pretrained(name, **options)
    except OSError as error:
        raise CheckpointError(f"{name} holds no checkpoint that can be read: {error}") from error


def _class(config, name):
    for architecture in config.architectures or ():
        cls = getattr(transformers, architecture, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    raise ConfigError(
        f"The config of {name} names the architectures {config.architectures}, none of which transformers has; "
        f"{INSTEAD}."
    )


def _digest_of(config):
    text = json.dumps(without_records(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
