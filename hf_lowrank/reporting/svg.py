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

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError(
            "The plots of a report need matplotlib, which is not installed: `pip install 'hf-lowrank[report]'`."
        ) from error
    with style.context({**SETTINGS, "svg.hashsalt": name}, after_reset=True):
        yield


def inline(figure, name, hints=None):
    """The SVG element of a matplotlib `figure`, made while [`styled`] is open.

    Args:
        figure (`matplotlib.figure.Figure`): what to draw.
        name (`str`): one word that no other figure of the page has.
        hints (`dict[str, str]`, *optional*): texts to show when the pointer rests on an artist, by its `gid`.
    """
    file = io.StringIO()
    # Neither the date nor the version, so that the same data give the same text.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # The page knows these namespaces.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Two digits behind the point are a thirtieth of a pixel; labels keep all of theirs.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r'<g id="([^"]*)">', lambda found: _group(found[1], used, hints or {}), text)
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = text.replace("font: ", "font-size: ").replace("px 'DejaVu Sans'", "px")
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _group(name, used, hints):
    if name in hints:
        return f"<g><title>{escape(hints[name])}</title>"
    return f'<g id="{name}">' if name in used else "<g>"
