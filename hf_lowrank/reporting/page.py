"""A report as one HTML page that needs nothing from anywhere."""

import base64
import hashlib
import json
import os
from pathlib import Path

import jinja2

from ..errors import MissingPackageError
from . import figures
from .quality import measures_of
from .svg import inline, styled


ASSETS = Path(__file__).parent / "assets"
# Of the table of layers: their heads, and whether they hold numbers. The last needs the dense model.
COLUMNS = (
    ("Layer", False), ("Shape", True), ("Format", False), ("Rank", True), ("Break-even", True), ("Parameters", True),
    ("Kept", True), ("Bytes", True), ("Error", True), ("Share", True), ("Weight error", True),
)  # fmt: skip
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
# Layers named by themselves under the plot of errors.
WORST = 8


def render(report):
    """The page that shows `report`, a [`Report`].

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (for the plots, further down)
    except ImportError as error:
        raise MissingPackageError(
            "The page of a report needs matplotlib, which is not installed: `pip install 'hf-lowrank[report]'`."
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        # Names of modules and texts come from anywhere.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    dashed = any(layer.weight_error is not None for layer in report.layers)
    return environment.get_template("page.html").render(
        report=report,
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
        stacks=_plots(report),
        outside=[layer for layer in report.layers if layer.block is None],
        factorized=[layer for layer in report.layers if layer.rank is not None],
        worst=_worst(report.layers),
        measures=measures_of(report.quality),
        method=_method(report.recipe or {}),
        has_spectra=any(layer.spectrum is not None for layer in report.layers),
        columns=COLUMNS[: None if dashed else -1],
        dashed=dashed,
        common=_common,
        recipe=None if report.recipe is None else json.dumps(report.recipe, indent=2, ensure_ascii=False),
    )


def _plots(report):
    """`[(stack, {plot: SVG})]`, only plots that have something to show."""
    stacks = {}
    for layer in report.layers:
        if layer.block is not None:
            stacks.setdefault(layer.stack, []).append(layer)
    return [(stack, _plots_of(layers, f"s{number}")) for number, (stack, layers) in enumerate(stacks.items())]


def _plots_of(layers, prefix):
    plots = {}
    for kind, draw in figures.ALL.items():
        name = f"{prefix}-{kind}"
        with styled(name):
            drawing = draw(layers)
            if drawing is not None:
                plots[kind] = inline(drawing[0], name, drawing[1])
    return plots


def _method(recipe):
    method = recipe.get("method")
    return method.get("name") if isinstance(method, dict) else method


def _worst(layers):
    known = [layer for layer in layers if layer.error_share is not None]
    return sorted(known, key=lambda layer: -layer.error_share)[:WORST]


def _common(texts):
    """How many characters all texts begin with, up to the last space."""
    head = os.path.commonprefix(texts)
    return len(head) if len(set(texts)) == 1 else head.rfind(" ") + 1


def _count(value):
    return f"{value:,}"


def _size(value):
    unit, power = next(((unit, power) for unit, power in UNITS if value >= power), UNITS[-1])
    return f"{value / power:,.1f} {unit}"


def _budget(value, name):
    if value is None:
        return "not known"
    if name in ("param_ratio", "energy"):
        return f"{value:.2%}"
    return _size(value) if name == "target_bytes" else _count(value)


FILTERS = {
    "budget": _budget,
    "change": lambda value: f"{value:+.3g}",
    "count": _count,
    "measure": lambda value, metric: f"{value:#.4g}" if metric == "perplexity" else f"{value:.3f}",
    "number": lambda value: f"{value:.4g}",
    "percent": lambda value, digits=1: f"{value:.{digits}%}",
    "size": _size,
}
