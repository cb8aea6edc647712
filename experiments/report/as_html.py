"""The report as one HTML page that needs nothing but itself: styles, plots and pictures are in it."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments.report import plots, tables
from experiments.report.tables import ENGINES, Report
from experiments.run.host.console import count

PHASES = ("vision", "prefill", "decode")


class Plot(NamedTuple):
    """An `<svg>` element and the words under it."""

    svg: str
    caption: str


def page(report: Report, directory: Path) -> str:
    """The report for a browser.

    Args:
        report: what `report.json` holds.
        directory: where the pictures of its examples lie; one that is missing is said to be.

    Returns:
        HTML that loads nothing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        headline=tables.headline(report),
        provenance=tables.provenance(report),
        sections=tables.sections(report),
        plots={name: list(found) for name, found in _plots(report)},
        export_gate=tables.export_gate(report),
        examples=[{**example, "data": _inlined(directory / example["picture"])} for example in report["examples"]],
        mark=tables.mark,
        uncurved=[stage["name"] for stage in report["stages"] if not stage["history"]],
    )


def _plots(report: Report) -> Iterator[tuple[str, Iterator[Plot]]]:
    """The plots of each section that has some."""
    yield "stages", _named("quality", _pareto(report))
    yield "latency", _named("phases", _phases(report))
    yield "losses", _named("loss", _losses(report))


def _named(prefix: str, found: Iterator[tuple[str, str]]) -> Iterator[Plot]:
    for place, (svg, caption) in enumerate(found):
        yield Plot(plots.own_ids(svg, f"{prefix}{place}"), caption)


def _pareto(report: Report) -> Iterator[tuple[str, str]]:
    scores = [(name, figures["exact_match"]) for name, figures in tables.models(report)]
    sizes = [figures["params"] for _, figures in tables.models(report)]
    times = [found["p50"] for _, found in tables.latencies(report, "jax")]
    for label, costs, form, unit in (
        ("parameters", sizes, count, ""),
        ("milliseconds of a request in JAX", times, lambda value: f"{value:.3g}", " ms"),
    ):
        points = [(name, cost, score) for (name, score), cost in zip(scores, costs, strict=True)]
        told = "; ".join(f"{name} {form(cost)}{unit}, {score:.3f}" for name, cost, score in points)
        caption = f"Exact match against {label}: higher and further to the left is better."
        yield plots.pareto(points, label, form, f"Exact match against {label}: {told}."), caption


def _phases(report: Report) -> Iterator[tuple[str, str]]:
    for engine, name in ENGINES.items():
        rows = tables.latencies(report, engine)
        told = "; ".join(f"{model} {_split(times)}" for model, times in rows)
        caption = f"{name}: what a request's phases take; at the end of each bar their sum."
        yield plots.phases(rows, PHASES, f"Milliseconds by phase in {name}: {told}."), caption


def _split(times: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {times[phase]:.3g}" for phase in PHASES)


def _losses(report: Report) -> Iterator[tuple[str, str]]:
    for stage in report["stages"]:
        history: Sequence[Mapping[str, Any]] = stage["history"]
        if history:
            told = f"from {history[0]['loss']:.3g} at step {history[0]['step']}"
            told += f" to {history[-1]['loss']:.3g} at step {history[-1]['step']}"
            yield plots.losses(history, f"Loss of stage {stage['name']}: {told}."), f"{stage['name']}: {told}"


def _inlined(picture: Path) -> str:
    """A PNG file as a data URI; "" where it is missing."""
    try:
        return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    except FileNotFoundError:
        return ""
