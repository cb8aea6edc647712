"""Plots of a report as reproducible SVG elements in the colours of the page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from experiments.report.svg import styled

WIDTH = 3.9
"""Width in inches; the page shows plots at about this size, so that text is readable on a phone."""

INK, FAINT, BACK = "#000101", "#000102", "#000103"
SERIES = tuple(f"#0002{place:02x}" for place in range(8))
MARKERS = "*sD^vPXp"

# matplotlib writes these colours into the SVG; they are replaced by CSS variables for light and dark mode.
_VARIABLES = {INK: "--ink", FAINT: "--line", BACK: "--back", **{c: f"--series-{n}" for n, c in enumerate(SERIES)}}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Point = tuple[str, float, float]
"""(name, x, y)"""


def pareto(points: Sequence[Point], label: str, form: Callable[[float], str], alt: str) -> str:
    """Plots quality against cost, with a marker for each model, connected in the order of the run.

    Args:
        points: (name, cost > 0, quality from 0 to 1).
        label: label of the cost axis.
        form: formats a cost.
        alt: alternative text.

    Returns:
        An `<svg>` element.
    """
    rows = math.ceil(len(points) / 2)
    with _axes(2.3 + 0.18 * rows) as (figure, axes):
        costs, scores = [cost for _, cost, _ in points], [score for *_, score in points]
        axes.plot(costs, scores, color=FAINT, linewidth=1, linestyle="--", zorder=1)
        for place, (name, cost, score) in enumerate(points):
            last = place == len(points) - 1
            axes.plot(
                cost,
                score,
                linestyle="none",
                # The export coincides with the last stage: draw it as a ring.
                marker="o" if last else MARKERS[place % len(MARKERS)],
                markersize=12 if last else 10 if place == 0 else 7,
                color=INK if last else SERIES[place % len(SERIES)],
                markerfacecolor="none" if last else None,
                label=name,
            )
        _logarithmic(axes, "x", min(costs), max(costs), form)
        _spread(axes, scores)
        axes.set_xlabel(label)
        axes.set_ylabel("exact match (macro)")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, alt)


def phases(rows: Sequence[tuple[str, Mapping[str, float]]], names: Sequence[str], alt: str) -> str:
    """Plots the phases of each model's request as stacked horizontal bars, the first model on top.

    Args:
        rows: name of the model and milliseconds by phase.
        names: the phases, from left to right.
        alt: alternative text.

    Returns:
        An `<svg>` element.
    """
    longest = max(sum(times[name] for name in names) for _, times in rows)
    with _axes(0.95 + 0.31 * len(rows)) as (figure, axes):
        ends = [0.0] * len(rows)
        for place, phase in enumerate(names):
            widths = [times[phase] for _, times in rows]
            axes.barh(range(len(rows)), widths, left=ends, height=0.66, color=SERIES[place], label=phase)
            for row, (start, width) in enumerate(zip(ends, widths, strict=True)):
                if width > 0.14 * longest:
                    axes.text(start + width / 2, row, _short(width, 2), ha="center", va="center", color=BACK, size=8)
            ends = [start + width for start, width in zip(ends, widths, strict=True)]
        for row, end in enumerate(ends):
            axes.text(end + 0.015 * longest, row, _short(end, 3), ha="left", va="center", size=8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.13 * longest)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("milliseconds (medians)")
        figure.legend(loc="outside upper center", ncols=len(names))
        return _svg(figure, alt)


def _short(value: float, digits: int) -> str:
    """Formats a number with the given significant digits; more if it has more before the decimal point."""
    return f"{value:.0f}" if value >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def losses(history: Sequence[Mapping[str, float]], alt: str) -> str:
    """Plots the loss of a stage over its steps.

    Args:
        history: points with `step` and `loss`; at least one.
        alt: alternative text.

    Returns:
        An `<svg>` element.
    """
    steps, values = [point["step"] for point in history], [point["loss"] for point in history]
    with _axes(2.0) as (figure, axes):
        axes.plot(steps, values, color=SERIES[0], linewidth=1.2, marker="o" if len(values) < 20 else None, markersize=3)
        # A logarithmic scale only helps if the loss changes by a large factor.
        if max(values) > 5 * min(values) > 0:
            _logarithmic(axes, "y", min(values), max(values), lambda value: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        return _svg(figure, alt)


@contextmanager
def _axes(height: float):
    """Creates a figure and its axes, with our style inside the context."""
    with styled(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def ticks(low: float, high: float) -> list[float]:
    """Returns at most about six round numbers from `low` to `high` (both > 0) for a logarithmic scale."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = [step * 10.0**power for power in powers for step in steps]
        inside = [value for value in candidates if low <= value <= high]
        if len(inside) <= 6:
            return inside
    return inside[:: math.ceil(len(inside) / 6)]


def _logarithmic(axes: Axes, side: str, low: float, high: float, form: Callable[[float], str]) -> None:
    # Wide enough for at least two round numbers.
    room = max(1.15, math.sqrt(5.5 * low / high))
    low, high = low / room, high * room
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _spread(axes: Axes, scores: Sequence[float]) -> None:
    """Limits the y axis to the range of scores, at least two points."""
    room = max(0.1 * (max(scores) - min(scores)), 0.01)
    axes.set_ylim(min(scores) - room, max(scores) + room)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _svg(figure: Figure, alt: str) -> str:
    """Converts the figure to an `<svg>` element with alternative text and the colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Remove everything that refers to other files or affects the page: metadata, global styles and fonts.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family: [^;]*;", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    return f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{text[text.index(">") + 1 :].strip()}'


def own_ids(svg: str, prefix: str) -> str:
    """Adds a prefix to all ids of an `<svg>` element, so that several plots on a page do not conflict.

    Args:
        svg: an `<svg>` element.
        prefix: letters that are unique on the page.

    Returns:
        The element.
    """
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    return svg.replace("url(#", f"url(#{prefix}-")
