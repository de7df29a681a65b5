"""The plots of a report, each of the layers of one stack: `(figure, hints)`, or `None` where there is nothing to show.

Figures are matplotlib's, drawn without pyplot and its global state; hints are texts for single artists.
"""

import math
from statistics import median

from .svg import ACCENT, INK, LINE, MUTED, ON_ACCENT, PANEL


WIDTH = 10.5
# Told apart by most eyes, on light and on dark ground.
PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#999999", "#997700",
)  # fmt: skip
STYLES = ("-", "--", ":")
# More blocks than this, and their cells are too narrow for a number.
NUMBERED = 24


def heat_map(layers):
    """What each projection keeps in each block: the stronger the colour, the more."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks, projections, cells = _grid(layers)
    figure = Figure(figsize=(WIDTH, 0.26 * len(projections) + 0.75), layout="constrained")
    axes, hints = figure.add_subplot(), {}
    for (block, projection), members in cells.items():
        kept = sum(m.parameters for m in members) / sum(m.dense_parameters for m in members)
        x, y = blocks.index(block), projections.index(projection)
        name = f"cell-{x}-{y}"
        axes.add_patch(
            Rectangle((x, y), 1, 1, facecolor=(ACCENT, _opacity(kept)), edgecolor=PANEL, linewidth=1.5, gid=name)
        )
        hints[name] = _hint(members, kept)
        if len(blocks) <= NUMBERED:
            colour = ON_ACCENT if kept > 0.6 else INK
            axes.text(x + 0.5, y + 0.5, _cell_text(members, kept), color=colour, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, len(blocks)), ylim=(len(projections), 0), xlabel="block")
    step = math.ceil(len(blocks) / 40)
    axes.set_xticks([i + 0.5 for i in range(0, len(blocks), step)], [str(b) for b in blocks[::step]])
    axes.set_yticks([i + 0.5 for i in range(len(projections))], projections)
    _bare(axes)
    return figure, hints


def kept_ranks(layers):
    """The rank of every layer, a line a projection; an empty ring where the weight stayed dense."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    blocks, projections, cells = _grid(layers)
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for index, projection in enumerate(projections):
        # Lines of one rank would hide each other.
        shift = (index - (len(projections) - 1) / 2) * 0.5 / len(projections)
        style = {"color": PALETTE[index % len(PALETTE)], "linestyle": STYLES[index // len(PALETTE) % len(STYLES)]}
        found = {block: members for (block, own), members in cells.items() if own == projection}
        ranks = {b: [m.rank for m in members if m.rank is not None] for b, members in found.items()}
        mean = [sum(ranks[b]) / len(ranks[b]) if ranks.get(b) else math.nan for b in blocks]
        axes.plot(
            [b + shift for b in blocks], mean, **style, linewidth=1.1, marker="o", markersize=3, label=projection
        )
        dense = [(b, m.full_rank) for b, members in found.items() for m in members if m.rank is None]
        axes.plot(
            [b + shift for b, _ in dense], [rank for _, rank in dense], linestyle="", marker="o", markersize=4.5,
            markerfacecolor="none", markeredgecolor=style["color"], markeredgewidth=1,
        )  # fmt: skip
    axes.set(xlabel="block", ylabel="rank", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    _legend(figure, axes)
    return figure, {}


def spectra(layers):
    """Singular values of what is stored, a panel a projection: median and range over blocks; dashed, the dense."""
    from matplotlib.figure import Figure

    groups = {}
    for layer in layers:
        if layer.spectrum is not None:
            groups.setdefault(layer.projection, []).append(layer)
    if not groups:
        return None
    rows = math.ceil(len(groups) / 4)
    columns = math.ceil(len(groups) / rows)
    figure = Figure(figsize=(WIDTH, 2.0 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (projection, members) in zip(grid.flat, groups.items(), strict=False):
        dense = [m.dense_spectrum for m in members if m.dense_spectrum is not None]
        if dense:
            x, _, middle, _ = _over(dense)
            axes.plot(x, middle, color=MUTED, linewidth=1, linestyle="--", label="dense")
        x, low, middle, high = _over([m.spectrum for m in members])
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=ACCENT, linewidth=1.4, label="stored")
        axes.set(yscale="log", title=projection, xlim=(0, None))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=LINE, linewidth=0.6)
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
    return figure, {}


def error_shares(layers):
    """What each block contributes to the error, stacked by projection."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if all(layer.error_share is None for layer in layers):
        return None
    blocks, projections, cells = _grid(layers)
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    bottom = dict.fromkeys(blocks, 0.0)
    for index, projection in enumerate(projections):
        shares = [sum(m.error_share or 0.0 for m in cells.get((b, projection), ())) for b in blocks]
        style = {"color": PALETTE[index % len(PALETTE)], "linewidth": 0}
        axes.bar(blocks, shares, bottom=list(bottom.values()), label=projection, **style)
        bottom = {b: bottom[b] + share for b, share in zip(blocks, shares, strict=True)}
    axes.set(xlabel="block", ylabel="share of the error")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    return figure, {}


ALL = {"heat": heat_map, "ranks": kept_ranks, "spectra": spectra, "errors": error_shares}


def _grid(layers):
    """Blocks in order, projections in the order of the model, and the layers of each cell."""
    cells = {}
    for layer in layers:
        cells.setdefault((layer.block, layer.projection), []).append(layer)
    return sorted({b for b, _ in cells}), list(dict.fromkeys(p for _, p in cells)), cells


def _opacity(kept):
    return 0.06 + 0.94 * min(kept, 1.0)


def _cell_text(members, kept):
    """The rank where it is one, and what is kept otherwise."""
    ranks = {m.rank for m in members}
    if ranks == {None}:
        return "dense"
    return str(*ranks) if len(ranks) == 1 else f"{kept:.0%}"


def _hint(members, kept):
    first = members[0]
    ranks = sorted({m.full_rank if m.rank is None else m.rank for m in members})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    state = "dense, full rank" if {m.rank for m in members} == {None} else "rank"
    many = f" ({len(members)} layers)" if len(members) > 1 else ""
    return f"block {first.block}, {first.projection}{many}: {state} {span} of {first.full_rank}, {kept:.1%} kept"


def _over(spectra):
    """`(index, least, median, greatest)` of singular values over the first, as far as half of the layers have some."""
    points = []
    for index in max(spectra, key=lambda spectrum: spectrum.count).index:
        values = [_at(spectrum, index) for spectrum in spectra if index <= spectrum.count]
        if 2 * len(values) >= len(spectra):
            points.append((index, min(values), median(values), max(values)))
    return zip(*points, strict=True)


def _at(spectrum, index):
    """The relative singular value at `index`, between two that were kept on the line from one to the other."""
    after = next(k for k, own in enumerate(spectrum.index) if own >= index)
    right, value = spectrum.index[after], spectrum.values[after]
    if right != index:
        left, before = spectrum.index[after - 1], spectrum.values[after - 1]
        value = before + (value - before) * (index - left) / (right - left)
    # A floor, below which float64 does not tell values from rounding, keeps logarithms finite.
    return max(value / spectrum.values[0], 1e-12) if spectrum.values[0] else 1e-12


def _legend(figure, axes):
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 8), fontsize=7.5, handlelength=1.2)


def _bare(axes):
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
