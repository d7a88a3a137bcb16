"""Draws charts with matplotlib: SVG for the page, PNG for loss.png. Touches no global state of matplotlib."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lora_accel.report.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Distinguishable with color blindness (Okabe and Ito, 2008), without its yellow and black, and a gray. The page has a
CSS variable for each (`--curve-0`, …), so that they differ in dark mode."""
LINE_STYLES = ("-", "--", "-.", ":")
"""The second sign of a line besides its color."""
MARKERS = "osD^vPX"
INK, FAINT = "#2a2f36", "#9aa1ab"
"""Colors of text and of grids; the page replaces them by its own."""
PANEL = "#f6f7f9"
"""Background of a legend where it covers a line; the page's panel."""
WIDTH, HEIGHT = 6.4, 3.1
"""Size of a chart, in inches of 72 SVG units."""
LOG_RATIO = 50
"""A positive quantity whose greatest value is this many times its median is drawn on a logarithmic axis."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart."""

    curve: Curve
    label: str
    color: int
    """Index into `COLORS`; higher numbers start again, with another line style."""
    is_faint: bool = False
    """Whether it is drawn behind the others, thin: the values that are smoothed."""
    has_markers: bool = False


@dataclasses.dataclass(frozen=True)
class Marks:
    """Steps at which something happened."""

    steps: Sequence[int]
    label: str
    style: str
    """Of a vertical line: a key of `MARK_STYLES`."""


MARK_STYLES = {"resume": (0, (5, 3)), "skipped": (0, (1, 2)), "stop": (0, (7, 2, 1, 2))}
MAX_MARKS = 50
"""Vertical lines that a chart draws of one kind."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: lines over steps."""

    title: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Marks] = ()
    star: tuple[int, float] | None = None
    """(step, value) of the best checkpoint."""
    may_be_log: bool = False
    begins_at_zero: bool = False
    """Whether the vertical axis begins at 0."""
    last_step: float = 0.0
    """End of the horizontal axis, which begins at 0. 0 = that of the lines."""


def draw_svg(chart: Chart) -> str:
    """Return a chart as an SVG element for a page: no size of its own, colors by CSS variables, no ids of its parts."""
    text = io.StringIO()
    with _style(chart.title):
        _figure(chart).savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    return _for_page(text.getvalue(), chart)


def draw_png(chart: Chart) -> bytes:
    """Return a chart as a PNG image on white, for model cards."""
    data = io.BytesIO()
    with _style(chart.title):
        _figure(chart).savefig(data, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return data.getvalue()


_METADATA = ("Date", "Creator", "Format", "Type")


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    """Set matplotlib's own defaults within the block, not those of the user's matplotlibrc.

    Args:
        salt: makes the ids of an SVG differ from those of other charts on the page, and the same each time.
    """
    import matplotlib
    from matplotlib import style

    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports that it builds its cache of fonts
    try:
        options: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "axes.formatter.useoffset": False,
            "text.parse_math": False,
        }
        with style.context("default", after_reset=True), matplotlib.rc_context(options), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a label has characters that its font lacks; the browser has others
            yield
    finally:
        log.setLevel(level)


def _figure(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(chart.lines):
        _draw_line(axes, line, number)
    for marks in chart.marks:
        for number, step in enumerate(list(marks.steps)[:MAX_MARKS]):
            label = None if number else marks.label
            axes.axvline(step, color=FAINT, linewidth=1, linestyle=MARK_STYLES[marks.style], label=label, zorder=1)
    if chart.star is not None:
        step, value = chart.star
        axes.plot([step], [value], "*", color=COLORS[1], markersize=13, label=f"best: {value:.4g}", zorder=5)
    _scale_axes(axes, chart)
    _label_axes(axes, chart)
    return figure


def _draw_line(axes: Axes, line: Line, number: int) -> None:
    steps, values = line.curve
    color = COLORS[line.color % len(COLORS)]
    style = LINE_STYLES[(line.color + line.color // len(COLORS)) % len(LINE_STYLES)]
    is_short = len(steps) <= 60
    options: dict[str, Any] = {"color": color, "label": _legend_text(line.label)}
    if line.is_faint:
        options |= {"linewidth": 0.8, "alpha": 0.4, "linestyle": "-", "zorder": 2}
    else:
        options |= {"linewidth": 1.7, "linestyle": style, "zorder": 3}
    if len(steps) == 1 or (line.has_markers and is_short):
        options |= {"marker": MARKERS[line.color % len(MARKERS)], "markersize": 4.5}
    axes.plot(steps, values, **options)


def _scale_axes(axes: Axes, chart: Chart) -> None:
    import numpy as np
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    values = np.concatenate([line.curve[1] for line in chart.lines]) if chart.lines else np.array([])
    values = values[np.isfinite(values)]
    is_spiky = chart.may_be_log and len(values) and values.min() > 0 and values.max() > LOG_RATIO * np.median(values)
    if is_spiky:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default is mathtext, which an SVG with text does not have
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(values) and values.max() >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif len(values) and 0 < np.abs(values).max() < 0.01:
        axes.yaxis.set_major_formatter("{x:.4g}")  # the default puts a power of ten above the axis
    if chart.begins_at_zero and len(values) and values.max() > 0:
        axes.set_ylim(0, 1.1 * values.max())
    elif not is_spiky and len(values) and values.min() >= 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)  # the margin below a line at 0 would show values that do not exist
    last_step = max(1.0, chart.last_step or _last_step(chart))
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if last_step >= 100_000 else "{x:,.0f}")


def _last_step(chart: Chart) -> float:
    return max((float(line.curve[0][-1]) for line in chart.lines if len(line.curve[0])), default=0.0)


def _label_axes(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=11.5, color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK, fontsize=9.5)
    axes.set_ylabel(chart.y_label, color=INK, fontsize=9.5)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(visible=True, color=FAINT, linewidth=0.5, alpha=0.35)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            fontsize=9,
            labelcolor=INK,
            facecolor=PANEL,
            edgecolor="none",
            framealpha=0.85,
            fancybox=False,
            handlelength=2.6,
        )


def _for_page(svg: str, chart: Chart) -> str:
    """Return the SVG element of a file, with the colors of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names such as axes_1, the same in each chart
    names = "; ".join(line.label for line in chart.lines if line.label)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(f"{chart.title}: {names}")}" ', 1)
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--curve-{number})")
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace(PANEL, "var(--panel)")


def _legend_text(label: str) -> str | None:
    """Return a label that matplotlib shows: it hides those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label or None
