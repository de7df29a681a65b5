"""Matplotlib figures as SVG that belongs to a page: its colours, its font, identifiers of its own."""

import io
import re
from contextlib import contextmanager
from html import escape


# Stand-ins for colours of the page, which differ in the light and in the dark.
COLOURS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--panel",
    "#050505": "--accent",
    "#060606": "--on-accent",
}
INK, MUTED, LINE, PANEL, ACCENT, ON_ACCENT = COLOURS
SETTINGS = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    # Text as text: smaller than outlines, and it can be searched and read aloud.
    "svg.fonttype": "none",
    "text.color": INK,
    # Names of modules are not formulas.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@contextmanager
def styled(name):
    """While open, figures are made and drawn in the style of the page, whatever the user's own style is.

    Args:
        name (`str`): of the figure; identifiers that drawing makes up depend on it alone.
    """
    from matplotlib import style

    with style.context({**SETTINGS, "svg.hashsalt": name}, after_reset=True):
        yield


def inline(figure, name, hints):
    """The SVG element of a matplotlib `figure`, made while [`styled`] is open.

    Args:
        figure (`matplotlib.figure.Figure`): what to draw.
        name (`str`): one word that no other figure of the page has.
        hints (`dict[str, str]`): texts to show when the pointer rests on an artist, by its `gid`.
    """
    file = io.StringIO()
    # Neither the date nor the version, so that the same data give the same text.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    # A style sheet in one plot would hold for the whole page, which has one.
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    text = re.sub(unwanted, "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    # Only tags change; in texts and attributes, < and > are escaped.
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], name, used, hints), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _tag(tag, name, used, hints):
    """A tag as the page wants it, and the title of the artist it begins."""
    artist = re.match(r'<g id="([^"]*)"', tag)
    # The page knows these namespaces.
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag).replace("xlink:href", "href")
    if tag.startswith("<svg"):
        tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    # Two digits behind the point are a thirtieth of a pixel.
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    for colour, variable in COLOURS.items():
        tag = tag.replace(colour, f"var({variable})")
    return f"{tag}<title>{escape(hints[artist[1]])}</title>" if artist and artist[1] in hints else tag
