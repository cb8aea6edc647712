"""The report as a self-contained HTML page with embedded styles, plots and images."""

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import realpath
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular
from experiments.report import plots, sentences, tables
from experiments.report.sentences import Report, engines
from experiments.run.host.console import count

PHASES = ("vision", "prefill", "decode")
_PICTURE = re.compile(r"ads/[0-9]+\.png")
"""Path of an example image in the folder of the report, see `figures.example`."""


class Plot(NamedTuple):
    """An `<svg>` element and its caption."""

    svg: str
    caption: str


def page(report: Report, directory: Path) -> str:
    """Renders the report as an HTML page.

    Args:
        report: contents of `report.json`.
        directory: folder of the example images; the page says if one is missing.

    Returns:
        HTML that loads no other files.
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
        headline=sentences.headline(report),
        provenance=tables.provenance(report),
        sections=tables.sections(report),
        plots={name: list(section) for name, section in _plots(report)},
        export_gate=sentences.export_gate(report),
        examples=[{**example, "data": _inlined(directory, example["picture"])} for example in report["examples"]],
        mark=tables.mark,
        uncurved=[stage["name"] for stage in report["stages"] if not stage["history"]],
    )


def _plots(report: Report) -> Iterator[tuple[str, Iterator[Plot]]]:
    """Plots by section."""
    yield "stages", _named("quality", _pareto(report))
    yield "latency", _named("phases", _phases(report))
    yield "losses", _named("loss", _losses(report))


def _named(prefix: str, plots_of_section: Iterator[tuple[str, str]]) -> Iterator[Plot]:
    for place, (svg, caption) in enumerate(plots_of_section):
        yield Plot(plots.own_ids(svg, f"{prefix}{place}"), caption)


def _pareto(report: Report) -> Iterator[tuple[str, str]]:
    scores = [(name, figures["exact_match"]) for name, figures in tables.models(report)]
    sizes = [figures["params"] for _, figures in tables.models(report)]
    kinds: list[tuple[str, list[float], Callable[[float], str], str]] = [("parameters", sizes, count, "")]
    if engines(report):
        times = [latency["p50"] for _, latency in tables.latencies(report, "jax")]
        kinds.append(("milliseconds per request in JAX", times, lambda value: f"{value:.3g}", " ms"))
    for label, costs, form, unit in kinds:
        points = [(name, cost, score) for (name, score), cost in zip(scores, costs, strict=True)]
        values = "; ".join(f"{name} {form(cost)}{unit}, {score:.3f}" for name, cost, score in points)
        caption = f"Exact match against {label}: higher and further to the left is better."
        yield plots.pareto(points, label, form, f"Exact match against {label}: {values}."), caption


def _phases(report: Report) -> Iterator[tuple[str, str]]:
    for engine, name in engines(report).items():
        rows = tables.latencies(report, engine)
        values = "; ".join(f"{model} {_split(times)}" for model, times in rows)
        caption = f"{name}: time of each phase of a request, with their sum at the end of each bar."
        yield plots.phases(rows, PHASES, f"Milliseconds by phase in {name}: {values}."), caption


def _split(times: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {times[phase]:.3g}" for phase in PHASES)


def _losses(report: Report) -> Iterator[tuple[str, str]]:
    for stage in report["stages"]:
        history: Sequence[Mapping[str, Any]] = stage["history"]
        if history:
            change = f"from {history[0]['loss']:.3g} at step {history[0]['step']}"
            change += f" to {history[-1]['loss']:.3g} at step {history[-1]['step']}"
            yield plots.losses(history, f"Loss of stage {stage['name']}: {change}."), f"{stage['name']}: {change}"


def _inlined(directory: Path, name: str) -> str:
    """Encodes an example image as a data URI; "" if it is missing. Raises AntgmmError for any other file."""
    picture = directory / str(name)
    if not _PICTURE.fullmatch(str(name)) or realpath(picture) != str(Path(realpath(directory)) / name):
        raise AntgmmError(f"{directory / 'report.json'}: {str(name)[:80]!r} is no picture of the report: correct it")
    try:
        check_regular(picture)
        return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    except FileNotFoundError:
        return ""
