"""Turn whatever the user calls calibration data into batches."""

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..checks import check_integer, check_number
from ..errors import CalibrationError, ConfigError
from ..statistics import Statistics
from ..statistics.collect import check_batch
from ..statistics.masks import IGNORED
from .data import read_texts
from .self_samples import sample_from


logger = logging.getLogger(__name__)

SELF = "self"
EMPTY = "`calibration` holds no text; give at least a few sentences."


@dataclass
class Calibration:
    """Calibration data with its sizes.

    Args:
        data: what `calibration` of [`LowRankConfig`] accepts. Defaults to `"self"`.
        samples (`int`, defaults to 48): sequences, of text or sampled from the model.
        length (`int`, defaults to 256): tokens a sequence.
        batch_size (`int`, defaults to 8): sequences a calibration pass; six times as many are sampled at once.
        sampled (`float`, defaults to 0.0): fraction of the sequences that the model itself writes, as for `"self"`,
            beside text in `data`, in [0, 1). Text knows the domain, samples what else the model has learnt; half of
            each was measured to keep more than as much text alone.
        temperature (`float`, defaults to 1.0): of sampling from the model, above 0.
        split (`str`, defaults to `"train"`): of a data set id.
        text_column (`str`, defaults to `"text"`): of a data set or `.jsonl` file.
        folder (`str`, *optional*): keep finished parts here (sampled sequences, statistics, refined blocks), collect
            statistics block by block, and go on from there after an interruption; by default everything is collected
            in one pass, in memory. The parts stay, and statistics are read from there.

    Raises:
        ConfigError: a value that is not allowed.
    """

    data: object = SELF
    samples: int = 48
    length: int = 256
    batch_size: int = 8
    sampled: float = 0.0
    temperature: float = 1.0
    split: str = "train"
    text_column: str = "text"
    folder: object = None

    def __post_init__(self):
        for name in ("samples", "length", "batch_size"):
            check_integer(name, getattr(self, name), 1, "Calibration")
        check_number("sampled", self.sampled, 0, 1, owner="Calibration", open_high=True)
        if self.sampled and (self._is_self() or not 0 < self.drawn < self.samples):
            raise ConfigError(
                f"`sampled`={self.sampled!r} of Calibration splits {self.samples} sequences between the model and the "
                "text in `data`, and leaves nothing to one of them; give text and more samples, or leave it 0."
            )
        check_number("temperature", self.temperature, 0, owner="Calibration", open_low=True)
        if self.folder is not None and not (isinstance(self.folder, (str, os.PathLike)) and os.fspath(self.folder)):
            raise ConfigError(f"`folder`={self.folder!r} of Calibration must be the path of a folder, or None.")
        if self.folder is not None and os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise ConfigError(f"`folder`={os.fspath(self.folder)!r} of Calibration is a file; name a folder.")

    def _is_self(self):
        return isinstance(self.data, str) and self.data == SELF

    @property
    def drawn(self):
        """Sequences that the model writes."""
        return self.samples if self._is_self() else round(self.sampled * self.samples)

    @property
    def given(self):
        """The part of the data that is given, without the sequences that the model writes; `None` if there is none."""
        return None if self._is_self() else replace(self, samples=self.samples - self.drawn, sampled=0.0)


def as_calibration(value):
    """A [`Calibration`] from any accepted value."""
    if isinstance(value, Calibration):
        return value
    return Calibration(data=value)


def saved_statistics(calibration, token=None):
    """The [`Statistics`] that `calibration` names, or `None` where it is data."""
    data = calibration.data
    if not isinstance(data, Statistics) and (
        not isinstance(data, (str, os.PathLike)) or not os.fspath(data).endswith(".safetensors")
    ):
        return None
    _refuse_sampled(calibration, "saved statistics")
    if isinstance(data, Statistics):
        return data
    path = os.fspath(data)
    if not os.path.exists(path):
        parts = path.split("/", 2)
        if len(parts) < 3 or path.startswith(("/", ".")):
            raise CalibrationError(
                f"`calibration`={path!r} does not exist; a statistics file on the Hub is named "
                "'owner/repository/file.safetensors'."
            )
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("/".join(parts[:2]), parts[2], token=token)
    return Statistics.load(path)


def check_calibration(calibration, model):
    """Refuse data that cannot work, before anything is loaded. `model` may be on the meta device."""
    data = calibration.data
    if data is None:
        raise CalibrationError(
            "The method needs calibration statistics and `calibration` is None; give data, or use `method='svd'`."
        )
    if calibration.drawn and not is_causal(model):
        asked = "`calibration`='self'" if data == SELF else f"`sampled`={calibration.sampled:g} of Calibration"
        raise CalibrationError(
            f"{asked} samples text from a causal language model, which {type(model).__name__} is not "
            "(or not only); give texts, batches (a list of dicts or a dataloader), a data set id or a statistics "
            "file, or use `method='svd'` and `allocation='uniform'`, which need none."
        )
    named = isinstance(data, (str, os.PathLike))
    is_text = named or _are_texts(data)
    if not is_text:
        _refuse_sampled(calibration, type(data).__name__)
    path = os.fspath(data) if named else ""
    if path.endswith((".jsonl", ".txt")) and not os.path.exists(path):
        raise CalibrationError(f"`calibration`={path!r} does not exist.")
    if is_text and not hasattr(model, "config"):
        raise CalibrationError(f"`calibration` is text, which {type(model).__name__} cannot read; give batches.")
    if is_text and data != SELF and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CalibrationError(
            f"`calibration` is text, and {type(model).__name__} needs inputs for its decoder too; give batches (a "
            "list of dicts) with `labels` or `decoder_input_ids`."
        )
    if isinstance(data, (list, tuple)) and not data:
        raise CalibrationError("`calibration` is an empty list; give at least one text or one batch.")
    if not (path if named else isinstance(data, Iterable) and not isinstance(data, torch.Tensor)):
        raise CalibrationError(f"`calibration`={data!r} is neither a name, nor a list, nor a dataloader.")


def _refuse_sampled(calibration, what):
    if calibration.sampled:
        raise CalibrationError(
            f"`sampled`={calibration.sampled:g} of Calibration puts sequences of the model's own beside text, and "
            f"`calibration` is {what}; give texts, or leave `sampled` 0."
        )


def make_batches(calibration, model, tokenizer, seed, processes=None):
    """`(batches, provenance)` for one pass.

    Args:
        calibration ([`Calibration`]): the data.
        model (`PreTrainedModel`): the dense model, for sampling and for sizes.
        tokenizer (`Callable[[], PreTrainedTokenizer]`): called only if text has to be tokenized.
        seed (`int`): of sampling.
        processes ([`Processes`], *optional*): that share the data out; the batches are then those of this one.
    """
    batches, provenance = [], {}
    if calibration.given is not None:
        batches, provenance = _given_batches(calibration.given, model, tokenizer)
        batches = batches if processes is None else processes.share(batches)
    if calibration.drawn:
        own, first = replace(calibration, data=SELF, samples=calibration.drawn, sampled=0.0), seed
        if processes is not None:
            # Each draws its own part only.
            own, first = processes.samples(own), seed + processes.index
        batches = [*batches, *_blocks(sample_from(model, own, first), calibration)]
    provenance = described(calibration, provenance, seed)
    return batches, provenance if processes is None else {**provenance, "processes": processes.count}


def described(calibration, given, seed):
    """JSON about all of the data: `given` is about the part that the model does not write."""
    if not calibration.drawn:
        return given
    facts = {"samples": calibration.drawn, "length": calibration.length, "temperature": calibration.temperature}
    if calibration.sampled:
        facts["samples"] += given["samples"]
        facts["sampled"] = calibration.sampled
    return {"data": SELF, **given, **facts, "seed": seed}


def _given_batches(calibration, model, tokenizer):
    data = calibration.data
    if isinstance(data, (str, os.PathLike)):
        texts = read_texts(data, calibration.split, calibration.text_column)
        # Of a file, its name; of a data set, its id.
        name = Path(data).name if os.path.exists(data) else os.fspath(data)
    elif _are_texts(data):
        texts, name = data, f"{len(data)} texts"
    else:
        return [data] if isinstance(data, Mapping) else data, {"data": "batches"}
    batches, length, digest = _text_batches(texts, tokenizer(), calibration, model)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    if samples * length < calibration.samples * calibration.length / 2 and is_causal(model):
        logger.warning(
            "`calibration`=%s gives %d sequences of %d tokens where %d of %d were asked for; give more text, or lower "
            "`samples` and `length` of Calibration.",
            name,
            samples,
            length,
            calibration.samples,
            calibration.length,
        )
    return batches, {"samples": samples, "length": length, "data": name, "sha256": digest}


def load_tokenizer(path, argument="calibration", error=CalibrationError, **hub):
    """The tokenizer in the repository or folder `path`; `argument` is text, and `error` is raised if there is none."""
    if not path:
        raise error(f"`{argument}` is text and the model has no `name_or_path`; pass `tokenizer`.")
    try:
        return AutoTokenizer.from_pretrained(path, **hub)
    except (OSError, ValueError) as missing:
        raise error(
            f"`{argument}` is text and no tokenizer could be loaded from {path}; save one there, or give batches of "
            "token ids instead of texts."
        ) from missing


def _are_texts(data):
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, str) for item in data)


def is_causal(model):
    """Whether `model` writes text and reads nothing else."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        return False
    # A model that also reads images or sound has layers which text never reaches.
    text_only = model.config.get_text_config() is model.config
    return text_only and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def labels_for(model, batch):
    """The labels of a batch: its own, or of a causal model the tokens that it reads; `None` where there are none."""
    if "labels" in batch:
        return batch["labels"]
    if not is_causal(model) or "input_ids" not in batch:
        return None
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)


class Labelled:
    """Batches that all have labels.

    Args:
        model (`torch.nn.Module`): what they are for.
        batches (`Iterable[dict]`): calibration batches.

    Raises:
        CalibrationError: when a batch is met that has none.
    """

    def __init__(self, model, batches):
        self.model, self.batches = model, batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            check_batch(batch)
            labels = labels_for(self.model, batch)
            if labels is None:
                raise CalibrationError(
                    f"`calibration` has batches without `labels`, and {type(self.model).__name__} needs them here: an "
                    "allocation or a method reads the gradient of the loss on given labels. Add them."
                )
            yield {**batch, "labels": labels}


def _text_batches(texts, tokenizer, calibration, model):
    """`(batches, tokens that a sequence has at most, sha256 of the texts used)`.

    A causal language model reads contiguous blocks without padding, made of the texts joined by blank lines, as in
    pre-training. Other models read one text a sample, with their special tokens, padded to the longest of a batch.
    """
    length = min(calibration.length, _max_length(model) or calibration.length)
    digest = hashlib.sha256()
    if not is_causal(model):
        chosen = list(itertools.islice(texts, calibration.samples))
        if not chosen:
            raise CalibrationError(EMPTY)
        digest.update("".join(chosen).encode())
        size = calibration.batch_size
        batches = [
            dict(
                tokenizer(chosen[i : i + size], padding=True, truncation=True, max_length=length, return_tensors="pt")
            )
            for i in range(0, len(chosen), size)
        ]
        return batches, length, digest.hexdigest()
    wanted, ids = calibration.samples * length, []
    for text in texts:
        digest.update(text.encode())
        ids.extend(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])
        if len(ids) >= wanted:
            break
    if not ids:
        raise CalibrationError(EMPTY)
    length = min(length, len(ids))
    count = min(len(ids) // length, calibration.samples)
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    return _blocks(blocks, calibration), length, digest.hexdigest()


def _max_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _blocks(sequences, calibration):
    return [{"input_ids": block} for block in sequences.split(calibration.batch_size)]
