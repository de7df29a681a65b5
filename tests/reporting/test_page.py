"""The page: nothing from elsewhere, everything escaped, the same bytes each time, small for large models."""

import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import torch
from processes import run
from torch import nn

from hf_lowrank import LowRankConfig, Report, factorize, report
from hf_lowrank.reporting.svg import COLOURS
from hf_lowrank.testing import tiny_model

from .conftest import HOSTILE, evaluation


class Tags(HTMLParser):
    """What a page is made of: tags with their attributes, texts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_comes_from_elsewhere(page):
    assert "http" not in page.replace("http-equiv", "")
    for tag, attributes in Tags(page).tags:
        assert tag not in ("link", "iframe", "img", "image", "object", "embed", "base", "form", "foreignobject")
        assert attributes.get("href", "#").startswith("#")
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_policy_allows_only_the_own_script(page):
    policy = next(a["content"] for t, a in Tags(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_every_text_is_escaped(page):
    parsed = Tags(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "<script>window" not in page
    assert parsed.texts.count(HOSTILE) == 4, "a prompt, a text, and the label of a model in two places"
    assert any(text.startswith(f"{HOSTILE}, from 14.70 ") for text in parsed.texts), "and in a third"


def test_names_of_modules_and_models_are_escaped():
    torch.manual_seed(0)
    block = nn.Module()
    block.add_module("<script>alert(1)</script>", nn.Linear(30, 30))
    block.add_module("$\\frac{1}{2}$ & <b>", nn.Linear(30, 30))
    block.add_module("font: #010101 url(#a)", nn.Linear(30, 30))
    model = nn.Module()
    model.add_module("blocks<b>", nn.ModuleList([block]))
    found = report(factorize(model, LowRankConfig(method="svd", param_ratio=0.5)))
    found.model["name"] = HOSTILE
    parsed = Tags(found.html())
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "".join(parsed.texts).count("<script>alert(1)</script>") >= 4, "in plots, hints and tables"
    assert "".join(parsed.texts).count("$\\frac{1}{2}$ & <b>") >= 4, "not as a formula"
    assert "".join(parsed.texts).count("font: #010101 url(#a)") >= 4, "not as a style"
    assert f"{HOSTILE}, factorized" in parsed.texts


def test_identifiers_are_unique_and_references_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in Tags(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_colours_of_plots_are_those_of_the_page(page):
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        assert "var(--" in plot
        assert not any(colour in plot for colour in (*COLOURS, "#000000"))
        for unwanted in ("<metadata", "<style", "font-family"):
            assert unwanted not in plot


def test_every_cell_of_the_heat_map_says_what_it_is(full, page):
    hints = re.findall(r"<title>(block [^<]*)</title>", page)
    assert len(hints) == sum(layer.block is not None for layer in full.layers) == 14
    layer = full.layers[0]
    assert f"block 0, q_proj: rank {layer.rank} of 64, {layer.kept:.1%} kept" in hints
    assert "block 1, up_proj: dense, full rank 64 of 64, 100.0% kept" in hints


def test_the_table_has_every_layer(full, page):
    for layer in full.layers:
        row = re.search(rf"<tr>\s*<th scope=\"row\"><code>{re.escape(layer.name)}</code>.*?</tr>", page, re.DOTALL)[0]
        for value in (layer.rank or "full", f"{layer.parameters:,}", f"{layer.kept:.1%}", layer.format):
            assert f">{value}" in row
        assert row.count("<td") == 10


def test_measures_are_compared_only_on_the_same_data():
    model = factorize(tiny_model("llama")[0], LowRankConfig(method="svd", param_ratio=0.5))
    same = report(model, quality={"a": evaluation(14.7), "b": evaluation(15.0)}, spectra=False).html()
    assert "+0.3" in same
    assert "not comparable" not in same
    other = report(model, quality={"a": evaluation(14.7), "b": evaluation(15.0, sha="c")}, spectra=False).html()
    assert "not comparable" in other
    assert "+0.3" not in other
    only = report(model, quality={"a": evaluation(14.7), "b": evaluation(15.0, 0.5)}, spectra=False).html()
    assert only.count("not measured") == 1


def test_only_what_is_known_is_shown():
    model = factorize(tiny_model("llama")[0], LowRankConfig(method="svd", param_ratio=0.5))
    page = report(model, spectra=False).html()
    for absent in ("Quality", "Spectra", "In its own words", "Weight error", "outside of repeated blocks"):
        assert absent not in page
    assert [a["data-plot"] for _, a in Tags(page).tags if "data-plot" in a] == ["heat", "ranks", "errors"]


def test_each_stack_has_its_plots():
    model = factorize(tiny_model("t5")[0], LowRankConfig(method="svd", param_ratio=0.5))
    page = report(model).html()
    labels = [a["aria-label"] for _, a in Tags(page).tags if "data-plot" in a]
    for stack in ("encoder.block", "decoder.block"):
        assert sum(f" of {stack}." in label for label in labels) == 4


def settings():
    """Those of matplotlib; asking for the backend would choose one."""
    import matplotlib

    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_the_same_bytes_in_another_process_and_in_another_style(full, page, tmp_path):
    import matplotlib

    full.save(tmp_path)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = settings()
        assert full.html() == page
        assert settings() == before
    code = (
        "import sys, hashlib, hf_lowrank\n"
        f"page = hf_lowrank.Report.load({str(tmp_path)!r}).html()\n"
        "print(hashlib.sha256(page.encode()).hexdigest(), 'matplotlib.pyplot' in sys.modules)"
    )
    done = run(code, PYTHONHASHSEED="7")
    assert done.stdout.split() == [hashlib.sha256(page.encode()).hexdigest(), "False"], done.stderr


def test_hundreds_of_layers_stay_small(large, tmp_path):
    large.save(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1.5e6
    assert (tmp_path / "report.json").stat().st_size < 3e6
    assert Report.load(tmp_path) == large


def test_sizes_as_people_say_them(large):
    page = replace(large, bytes=4 << 30, dense_bytes=5 << 30, layers=[]).html()
    assert "1.25x smaller" in page
    assert "5.0 GiB → 4.0 GiB" in page
