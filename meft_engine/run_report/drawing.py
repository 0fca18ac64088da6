"""Pictures whose colours follow the page: drawn by matplotlib, written as SVG in which a colour is a CSS variable."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

# The runs' are near Okabe and Ito's, which the colour-blind can tell apart; what they mean a marker says too. Phases
# have a hue for each part of a step, dark to light. Loads go from orange (few) to blue (many).
LIGHT = {
    **{"surface": "#fffffe", "ink": "#1b2027", "muted": "#5a6470", "grid": "#e4e8ec", "frame": "#b9c1ca"},
    **{"run0": "#0072b2", "run1": "#d55e00", "run2": "#009e73", "run3": "#bd5f93"},
    **{"run4": "#a87400", "run5": "#2e93c9", "run6": "#7b4fa3", "run7": "#4f5b66"},
    **{"forward": "#08519c", "route": "#3182bd", "gather": "#6baed6", "combine": "#a6cfe8"},
    **{"backward": "#a63603", "row_gradients": "#f08438", "exchange": "#8c2d82"},
    **{
        "norm": "#00662a",
        "optimizer": "#31a354",
        "update": "#a1d99b",
        "wait": "#e3b505",
        "save": "#5b4a8a",
        "other": "#98a1ab",
    },
    **{"load0": "#7f3b08", "load1": "#b35806", "load2": "#e08214", "load3": "#fdc98a", "load4": "#eef0f2"},
    **{"load5": "#c3d9ec", "load6": "#7fb2d9", "load7": "#2f7fbc", "load8": "#08306b"},
}
DARK = {
    **{"surface": "#171b21", "ink": "#e8ecf1", "muted": "#a3adb8", "grid": "#2b323b", "frame": "#4a545f"},
    **{"run0": "#4aa8e0", "run1": "#ff8f4a", "run2": "#2fc79a", "run3": "#e59bc6"},
    **{"run4": "#f0b93a", "run5": "#a5dcff", "run6": "#b99be0", "run7": "#b4bdc7"},
    **{"forward": "#2f6fbd", "route": "#4f9ad6", "gather": "#82bfe6", "combine": "#bfe0f5"},
    **{"backward": "#c2571a", "row_gradients": "#ff9f57", "exchange": "#c06ab8"},
    **{
        "norm": "#2a8f4f",
        "optimizer": "#4fbf75",
        "update": "#b2e3ab",
        "wait": "#f0c93c",
        "save": "#8f7cc4",
        "other": "#6d7681",
    },
    **{"load0": "#ffdfb5", "load1": "#f7a94f", "load2": "#c97a22", "load3": "#6e4a22", "load4": "#2a3038"},
    **{"load5": "#26465f", "load6": "#2f6ea3", "load7": "#62aee6", "load8": "#cfe9ff"},
}
MARKERS = "os^DvPX*"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDTH, HEIGHT = 4.7, 2.75
"""Of a picture, in inches: as narrow as a phone, so that its letters can be read there."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a colour of the palette, and the mark that has it."""

    label: str
    color: str
    marker: str = ""
    dash: int = 0
    filled: bool = False


@dataclass
class Table:
    """The numbers of a picture: rows of cells, of which numbers are shown by ``words`` of their column."""

    columns: list[str]
    rows: list[list[Any]]
    words: list[Callable[[float], str] | None]
    note: str = ""


@dataclass
class Chart:
    """A picture, what it says to those who do not see it, and its numbers."""

    key: str
    title: str
    says: str
    draw: Callable[[Axes], None]
    table: Table
    legend: list[Key] = field(default_factory=list)
    height: float = HEIGHT
    about: str = ""
    """What a reader has to know to read it."""

    def figure(self, *, alone: bool = False) -> Figure:
        """Drawn; ``alone``: with the title and the legend that otherwise stand beside it in the page."""
        height = self.height + (0.35 + 0.2 * (len(self.legend) + 1) // 2 if alone else 0)
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            axes = figure.add_subplot()
            self.draw(axes)
            if alone:
                figure.suptitle(self.title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=LIGHT["ink"])
                handles = [_handle(key) for key in self.legend]
                if handles:
                    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
        return figure

    def svg(self) -> str:
        """An ``<svg>`` element for a page that defines the variables of :func:`variables`."""
        file = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.key}):
            self.figure().savefig(file, format="svg", metadata={"Date": None})
        return _for_page(file.getvalue(), self.key, self.title, self.says)

    def png(self, path: Path) -> None:
        """Write the picture in light colours."""
        with matplotlib.rc_context(_STYLE):
            self.figure(alone=True).savefig(path, format="png", dpi=160, facecolor=LIGHT["surface"])


_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["frame"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.facecolor": LIGHT["surface"],
    "figure.facecolor": LIGHT["surface"],
    "axes.axisbelow": True,
    "text.parse_math": False,  # a run may be named $x$
    "axes.formatter.limits": (-3, 5),
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["frame"],
    "ytick.color": LIGHT["frame"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.labelcolor": LIGHT["ink"],
}


def variables(theme: dict[str, str]) -> str:
    """CSS that gives the palette's names their colours."""
    return "".join(f"--{name}:{color};" for name, color in theme.items())


def color_of_run(index: int) -> str:
    """The palette's name of a run's colour."""
    return f"run{index % 8}"


def line(axes: Axes, x: list[Any], y: list[float], key: Key) -> None:
    """A line as its legend shows it; few points have markers, many a few of them."""
    axes.plot(
        x,
        y,
        color=LIGHT[key.color],
        linestyle=DASHES[key.dash % len(DASHES)],
        marker=key.marker or None,
        markevery=max(1, len(x) // 12),
        markeredgewidth=0,
    )


def steps_axis(axes: Axes) -> None:
    """What most pictures run over."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.grid(axis="y")


def _handle(key: Key) -> Any:
    if key.filled:
        return Patch(color=LIGHT[key.color], label=key.label)
    dash = DASHES[key.dash % len(DASHES)]
    return Line2D([], [], color=LIGHT[key.color], linestyle=dash, marker=key.marker or None, label=key.label)


def legend_mark(key: Key) -> str:
    """An ``<svg>`` element: the mark of a legend's entry."""
    if key.filled:
        shape = f'<rect x="3" y="2" width="18" height="10" rx="2" fill="var(--{key.color})"/>'
        return f'<svg class="mark" viewBox="0 0 24 14" aria-hidden="true">{shape}</svg>'
    dash = DASHES[key.dash % len(DASHES)]
    dashes = "" if dash == "-" else f' stroke-dasharray="{" ".join(f"{1.2 * part:g}" for part in dash[1])}"'
    found = f'<path d="M1 7H35" stroke="var(--{key.color})" stroke-width="2" fill="none"{dashes}/>'
    if key.marker:
        found += f'<path d="{_SHAPES[key.marker]}" transform="translate(6)" fill="var(--{key.color})"/>'
    return f'<svg class="mark line" viewBox="0 0 36 14" aria-hidden="true">{found}</svg>'


_SHAPES = {
    "o": "M8.5 7a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
    "s": "M8.8 3.8h6.4v6.4h-6.4Z",
    "^": "M12 3l4 7h-8Z",
    "D": "M12 2.5l4.5 4.5l-4.5 4.5l-4.5 -4.5Z",
    "v": "M12 11l4 -7h-8Z",
    "P": "M10.7 3h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7Z",
    "X": "M8.6 5.2l1.6 -1.6l1.8 1.8l1.8 -1.8l1.6 1.6l-1.8 1.8l1.8 1.8l-1.6 1.6l-1.8 -1.8l-1.8 1.8l-1.6 -1.6l1.8 -1.8Z",
    "*": "M12 2.4l1.3 3l3.2 .3l-2.4 2.1l.7 3.2l-2.8 -1.7l-2.8 1.7l.7 -3.2l-2.4 -2.1l3.2 -.3Z",
}

_VARIABLE_OF = {color: f"var(--{name})" for name, color in LIGHT.items()}


def _for_page(svg: str, key: str, title: str, says: str) -> str:
    """matplotlib's SVG as a part of a page: no identifier of its own twice, colours and font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]+>", lambda tag: _tag_for_page(tag[0], key), svg)
    svg = re.sub(r">\s+<", "><", svg)
    _, _, view = svg[: svg.index(">")].partition('viewBox="')
    box = view.partition('"')[0]
    opening = (
        f'<svg class="chart" viewBox="{box}" role="img" aria-labelledby="{key}-title {key}-says" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-says">{html.escape(says)}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :].strip()


def _tag_for_page(tag: str, key: str) -> str:
    tag = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{key}-", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLE_OF.get(found[0], found[0]), tag)
    tag = re.sub(r"font-family: [^;\"]+(; )?", "", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
    return re.sub(r"\s*\n\s*", " ", tag)
