"""The page in a real browser: nothing is fetched, nothing complains, everything is drawn, tables sort."""

import pytest
from chromium import browser, executable


pytestmark = pytest.mark.skipif(
    executable() is None, reason="no Chromium is installed; `apt-get install chromium` brings it"
)


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    with browser() as page:
        yield page


@pytest.fixture
def opened(chromium, page, tmp_path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    chromium.open(f"file://{tmp_path}/report.html")
    return chromium


def column(page, index):
    return page.run(
        f"[...document.querySelectorAll('#layers tbody tr')].map((row) => row.cells[{index}].textContent.trim())"
    )


def press(page, head):
    page.run(f"[...document.querySelectorAll('#layers thead button')].find((b) => b.textContent === {head!r}).click()")


def test_the_browser_would_tell(chromium, tmp_path):
    policy = "<meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\">"
    complaints = {
        "<script>console.error('broken')</script>": "broken",
        "<script>undefinedFunction()</script>": "Uncaught",
        f"{policy}<img src='http://127.0.0.1:9/x.png'>": "Content Security Policy",
    }
    for number, (html, complaint) in enumerate(complaints.items()):
        (tmp_path / f"{number}.html").write_text(html)
        chromium.open(f"file://{tmp_path}/{number}.html")
        assert any(complaint in text for text in chromium.complaints)
    (tmp_path / "request.html").write_text("<img src='http://127.0.0.1:9/x.png'>")
    chromium.open(f"file://{tmp_path}/request.html")
    assert "http://127.0.0.1:9/x.png" in chromium.requests


def test_no_complaint_and_no_request(opened, tmp_path):
    assert opened.complaints == []
    assert opened.requests == [f"file://{tmp_path}/report.html"]
    assert opened.run("typeof window.hacked") == "undefined"
    assert opened.run("document.scripts.length") == 1


def test_all_plots_are_drawn(opened, full):
    boxes = opened.run(
        "[...document.querySelectorAll('.plot')].map((plot) => {"
        "  const box = plot.querySelector('svg').getBoundingClientRect();"
        "  return [plot.dataset.plot, box.width, box.height, plot.querySelectorAll('path').length]; })"
    )
    assert [kind for kind, *_ in boxes] == ["heat", "ranks", "errors", "spectra"]
    for _, width, height, paths in boxes:
        assert width > 600
        assert height > 80
        assert paths >= 14
    cells = opened.run("document.querySelectorAll('[data-plot=heat] g > title').length")
    assert cells == sum(layer.block is not None for layer in full.layers)
    ink = opened.run("getComputedStyle(document.querySelector('[data-plot=heat] text')).fill")
    assert ink in (opened.run("getComputedStyle(document.querySelector('h1')).color"), "rgb(98, 107, 124)")


def test_the_table_sorts(opened, full):
    names = [layer.name for layer in full.layers]
    assert column(opened, 0) == names
    press(opened, "Kept")
    kept = [float(text.rstrip("%")) for text in column(opened, 6)]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 2
    assert opened.run("document.querySelector('#layers [aria-sort]').textContent") == "Kept"
    press(opened, "Kept")
    assert [float(text.rstrip("%")) for text in column(opened, 6)] == sorted(kept)
    assert opened.run("document.querySelector('#layers [aria-sort]').ariaSort") == "ascending"
    press(opened, "Layer")
    assert column(opened, 0) == sorted(names)
    for _ in range(2):
        press(opened, "Error")
        assert column(opened, 8)[-1] == "–", "what is not known comes last either way"
        assert column(opened, 8).count("–") == 1
    assert opened.complaints == []


def test_the_table_filters(opened, full):
    opened.run(
        "const box = document.getElementById('filter');"
        "box.value = 'UP_PROJ dense';"
        "box.dispatchEvent(new Event('input'));"
    )
    shown = opened.run(
        "[...document.querySelectorAll('#layers tbody tr:not([hidden])')].map((row) => row.cells[0].textContent)"
    )
    assert shown == ["model.layers.1.mlp.up_proj"]
    assert opened.run("document.getElementById('shown').textContent") == f"1 of {len(full.layers)}"


def test_light_and_dark_wide_and_narrow(opened, tmp_path):
    colours = set()
    for scheme in ("light", "dark"):
        for width in (1280, 400):
            path = tmp_path / f"{scheme}-{width}.png"
            opened.screenshot(path, width, scheme)
            assert path.stat().st_size > 50_000
            assert opened.run("document.documentElement.scrollWidth") <= width, "tables and plots scroll by themselves"
            colours.add(opened.run("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    assert opened.complaints == []


def test_a_large_model(chromium, large, tmp_path):
    large.save(tmp_path)
    chromium.open(f"file://{tmp_path}/report.html")
    assert chromium.complaints == []
    assert len(column(chromium, 0)) == 560
    press(chromium, "Rank")
    assert column(chromium, 3)[0] == "full"
