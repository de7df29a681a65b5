"""A report of a factorized model: data first, and one page that shows them."""

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from types import UnionType
from typing import get_args, get_type_hints

from ..errors import ConfigError
from ..files import writing
from ..provenance import describe, environment
from .budget import Budget, budget_of
from .layers import Layer, layers_of
from .quality import measures_of
from .samples import Sample, as_samples
from .summary import summary


VERSION = 1
JSON, HTML = "report.json", "report.html"


@dataclass(frozen=True)
class Report:
    """Everything known about a factorized model; plain data, from which the page follows.

    Args:
        model (`dict`): its name, class and dtype.
        recipe (`dict`, *optional*): how it was factorized, as in its config.
        environment (`dict`): versions and processor.
        budget ([`Budget`]): asked for, and reached.
        parameters (`int`): of the whole model.
        dense_parameters (`int`): of the whole model, if nothing were factorized.
        bytes (`int`): of the whole model's parameters.
        dense_bytes (`int`): of the whole model's parameters, if nothing were factorized.
        layers (`list[Layer]`): targets, factorized or left dense, in the order of the model.
        quality (`dict[str, dict]`): evaluations as JSON, by the label of the model they were measured on.
        samples (`list[Sample]`): texts side by side.
    """

    model: dict
    recipe: dict | None
    environment: dict
    budget: Budget
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    layers: list[Layer]
    quality: dict
    samples: list[Sample]

    def __post_init__(self):
        measures_of(self.quality)

    def to_json(self):
        """The report as plain JSON, with the `version` of its layout."""
        return {"version": VERSION, **asdict(self)}

    def html(self):
        """One self-contained page: styles, script and plots inside, nothing fetched from anywhere.

        The same report gives the same bytes with the same versions of matplotlib and Jinja. Plots are SVG by
        matplotlib: pages of 37 and of 560 layers came to 0.15 and 0.7 MB, where the script that plotly puts into a
        page takes 4.8 MB before the first plot.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from .page import render

        return render(self)

    def save(self, folder):
        """Write `report.json` and `report.html` into `folder`, which is made if it does not exist.

        Both are complete before either appears.
        """
        os.makedirs(folder, exist_ok=True)
        texts = {JSON: json.dumps(self.to_json(), indent=1) + "\n", HTML: self.html()}
        with ExitStack() as complete:
            for name, text in texts.items():
                partial = complete.enter_context(writing(os.path.join(folder, name)))
                with open(partial, "w", encoding="utf-8", newline="\n") as file:
                    file.write(text)

    @staticmethod
    def load(path):
        """Read a report that [`Report.save`] wrote: the folder, or the JSON file.

        Raises:
            ConfigError: there is none, or it is damaged or of another version.
        """
        path = os.path.join(path, JSON) if os.path.isdir(path) else os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            if not isinstance(data, dict) or data.pop("version", None) != VERSION:
                raise ValueError(f"it does not say `version` {VERSION}")
            return _read(Report, data)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} is no report ({error}); write one with hf_lowrank.report(model).save(folder)."
            ) from error


def report(model, dense=None, quality=None, samples=None, spectra=True):
    r"""Describe a factorized model, layer by layer.

    Singular values of what is stored are those of `W' = left @ right`, computed from the factors:

        left = Q R,    right^T = P S,    s(W') = s(R S^T)

    Args:
        model (`torch.nn.Module`): factorized in memory, at load, or reloaded.
        dense (`torch.nn.Module`, *optional*): the model it was made from, in memory; adds the spectrum of every dense
            weight and the relative error of every weight in Frobenius norm.
        quality (`dict[str, Evaluation]`, *optional*): what `evaluate` returned, by the label of the model it was
            measured on; the first is what the others are compared with. The saved JSON will do.
        samples (*optional*): texts side by side, as [`text_samples`] returns them: a list of `{"prompt": text,
            "texts": {label: text}}`.
        spectra (`bool`, defaults to `True`): whether to compute singular values. It takes two QR decompositions and
            the SVD of an r x r matrix a weight, in float64.

    Returns:
        [`Report`]; `.save(folder)` writes `report.json` and `report.html`.

    Raises:
        ConfigError: `quality` or `samples` of another form.
        TargetError: `dense` is another model, or factorized.
        LowRankError: singular values of weights that are not in memory.
    """
    quality = {label: _as_json(label, evaluation) for label, evaluation in (quality or {}).items()}
    # What can be wrong is looked at before anything is computed. JSON goes through text, so that a report is the same
    # before and after it was saved.
    measures_of(quality)
    samples = as_samples(samples)
    described = json.loads(json.dumps(describe(model)))
    recipe = described.pop("quantization", {}).get("recipe")
    totals = summary(model)
    layers = layers_of(model, recipe, dense, spectra)
    return Report(
        model=described,
        recipe=recipe,
        environment=environment(),
        budget=budget_of(recipe, layers, totals.bytes),
        parameters=totals.parameters,
        dense_parameters=totals.dense_parameters,
        bytes=totals.bytes,
        dense_bytes=totals.dense_bytes,
        layers=layers,
        quality=quality,
        samples=samples,
    )


def _as_json(label, evaluation):
    try:
        return json.loads(json.dumps(evaluation.to_json() if hasattr(evaluation, "to_json") else evaluation))
    except TypeError as error:
        raise ConfigError(f"`quality`[{label!r}] is not an evaluation ({error}).") from error


def _read(hint, value):
    """`value`, plain JSON, as what the annotation `hint` of a field says; `ValueError` where it is something else."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            hints = get_type_hints(option)
            if set(value) != set(hints):
                raise ValueError(f"{option.__name__} has {sorted(set(value) ^ set(hints))} too much or too little")
            return option(**{key: _read(hints[key], value[key]) for key in hints})
        if get_args(option) and isinstance(value, list):
            return [_read(get_args(option)[0], entry) for entry in value]
        if not get_args(option) and isinstance(value, (int, float) if option is float else option):
            return value
    raise ValueError(f"{value!r:.60} is not {getattr(hint, '__name__', hint)}")
