"""Plots of a report as SVG elements for a page: equal figures give equal text, colours are the page's own."""

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
"""Inches; a page shows a plot at about its own size, so that its letters stay readable on a phone."""

INK, FAINT, BACK = "#000101", "#000102", "#000103"
SERIES = tuple(f"#0002{place:02x}" for place in range(8))
MARKERS = "*sD^vPXp"

# matplotlib writes these colours into the SVG; the page's variables, which know light from dark, take their places.
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
"""Name, place along x, place along y."""


def pareto(points: Sequence[Point], label: str, form: Callable[[float], str], alt: str) -> str:
    """Quality against a cost, a marker for each model, joined in the order of the run.

    Args:
        points: name, cost > 0, quality from 0 to 1.
        label: of the cost.
        form: writes a cost.
        alt: what a reader who does not see the plot is told.

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
                # The export lies on the last stage: a ring around its mark.
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
    """Stacked horizontal bars: what the phases of each model's request take, the first model on top.

    Args:
        rows: name of the model and milliseconds by phase.
        names: the phases, from the left.
        alt: what a reader who does not see the plot is told.

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
    """A number of so many digits, zeros behind the point among them; all digits where more stand before it."""
    return f"{value:.0f}" if value >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def losses(history: Sequence[Mapping[str, float]], alt: str) -> str:
    """The loss of a stage by its steps.

    Args:
        history: points with `step` and `loss`; at least one.
        alt: what a reader who does not see the plot is told.

    Returns:
        An `<svg>` element.
    """
    steps, values = [point["step"] for point in history], [point["loss"] for point in history]
    with _axes(2.0) as (figure, axes):
        axes.plot(steps, values, color=SERIES[0], linewidth=1.2, marker="o" if len(values) < 20 else None, markersize=3)
        # On a logarithmic scale little would be seen of a loss that falls by less.
        if max(values) > 5 * min(values) > 0:
            _logarithmic(axes, "y", min(values), max(values), lambda value: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        return _svg(figure, alt)


@contextmanager
def _axes(height: float):
    """A figure of its own, known to no window, and its axes; the style ends with it."""
    with styled(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic scale from `low` to `high`, both > 0; fewer where they would be many."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        inside = [value for value in found if low <= value <= high]
        if len(inside) <= 6:
            return inside
    return inside[:: math.ceil(len(inside) / 6)]


def _logarithmic(axes: Axes, side: str, low: float, high: float, form: Callable[[float], str]) -> None:
    # Wide enough for two round numbers at least.
    room = max(1.15, math.sqrt(5.5 * low / high))
    low, high = low / room, high * room
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _spread(axes: Axes, scores: Sequence[float]) -> None:
    """Limits that show differences of a point, and no more than those are."""
    room = max(0.1 * (max(scores) - min(scores)), 0.01)
    axes.set_ylim(min(scores) - room, max(scores) + room)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an element of a page: an image with a text for it, its ids its own, its colours the page's."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # What would load something or reach beyond the plot: metadata with addresses, a style for every element, fonts.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family: [^;]*;", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    return f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{text[text.index(">") + 1 :].strip()}'


def own_ids(svg: str, prefix: str) -> str:
    """The element with a prefix before each of its ids: those of two plots on one page must not meet.

    Args:
        svg: an `<svg>` element.
        prefix: letters, unlike those of the page's other plots.

    Returns:
        The element.
    """
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    return svg.replace("url(#", f"url(#{prefix}-")
