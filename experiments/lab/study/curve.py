"""Arms as points of a curve: quality against compression and speed-up, and the knee of the curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from experiments.lab.planning.rates import ROUNDS, RequestSize, random_prompt, with_random_parameters
from experiments.lab.study.summary import COLOURS, SCORES, by_arm, format_scores
from experiments.report.as_markdown import table
from experiments.report.latency import measure
from experiments.report.plots import ticks
from experiments.report.svg import save, styled
from experiments.report.tables import Table
from experiments.run.files import write_json, write_text
from pruning.costs import total_parameters

TIMES = {"smaller": "times fewer parameters", "faster": "times lower latency in JAX"}
HEAD = ("arm", "parameters", *TIMES.values(), *(f"exact match on {name}" for name in SCORES.values()))


def with_costs(results: Sequence[dict[str, Any]], teacher: LMMConfig, request: RequestSize) -> list[dict[str, Any]]:
    """Adds compression and speed-up to results; it measures the latency of all shapes and of the teacher.

    Args:
        results: results with `sizes` and `params`.
        teacher: config of the teacher.
        request: request to measure, at batch 1.

    Returns:
        The results with `smaller` and `faster` (ratios to the teacher) and `latency_ms`.
    """
    shapes = [shape_of(teacher, result) for result in results]
    prompt = random_prompt(teacher, request.length)
    requests = {
        shape: with_random_parameters(shape, prompt, request.answer) for shape in (teacher, *dict.fromkeys(shapes))
    }
    times = measure(requests, repeats=ROUNDS)
    whole = total_parameters(teacher)
    return [
        {
            **result,
            "smaller": whole / result["params"],
            "faster": times[teacher].p50 / times[shape].p50,
            "latency_ms": times[shape].p50,
        }
        for result, shape in zip(results, shapes, strict=True)
    ]


def shape_of(teacher: LMMConfig, result: Mapping[str, Any]) -> LMMConfig:
    """Returns the config of the student of a run.

    Sizes do not determine which layers of a bridge have cross-attention, but the number of parameters does.

    Args:
        teacher: config of the teacher.
        result: result of the run with `sizes` and `params`.

    Returns:
        Config of the student.

    Raises:
        AntgmmError: no model of these sizes has this number of parameters.
    """
    for shape in pruning.planned_configs(teacher, result["sizes"]):
        if total_parameters(shape) == result["params"]:
            return shape
    raise AntgmmError(f"arm {result['arm']!r}: no model of its sizes has {result['params']} parameters: run it again")


def knee(costs: Sequence[float], scores: Sequence[float]) -> int:
    """Finds the knee of a curve: the point farthest above the line from the first point to the last.

    Costs are on a logarithmic scale (Kneedle, Satopaa et al. 2011, without smoothing).

    Args:
        costs: compression or speed-up, > 0; at least two different values.
        scores: quality of each.

    Returns:
        Index of the knee.
    """
    x, y = np.log(np.asarray(costs, float)), np.asarray(scores, float)
    low, high = np.argmin(x), np.argmax(x)
    line = y[low] + (y[high] - y[low]) * (x - x[low]) / (x[high] - x[low])
    return int(np.argmax(y - line))


def points(results: Sequence[dict[str, Any]], cost: str) -> tuple[list[str], list[float], list[float]]:
    """Returns arms, their costs and their mean scores on `test`."""
    arms = by_arm(results)
    means = [float(np.mean([run["exact_match"] for run in runs])) for runs in arms.values()]
    return list(arms), [runs[0][cost] for runs in arms.values()], means


def write_curve(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the results, their table with the knees, and their plot.

    Args:
        results: from `with_costs`.
        path: the JSON file; `.md` and `.svg` files are written next to it.
    """
    write_json(path, results)
    write_text(path.with_suffix(".md"), markdown(results))
    plot(results, path.with_suffix(".svg"))


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns a row for each arm: parameters, ratios to the teacher, scores."""
    return [
        (
            arm,
            f"{runs[0]['params'] / 1e3:.0f} k",
            *(f"{runs[0][cost]:.1f}x" for cost in TIMES),
            *(format_scores([run[score] for run in runs if score in run]) for score in SCORES),
        )
        for arm, runs in by_arm(results).items()
    ]


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown, with the knee for each cost."""
    knees = []
    for cost, label in TIMES.items():
        arms, costs, scores = points(results, cost)
        place = knee(costs, scores)
        knees.append(f"by {label} at {costs[place]:.1f}x (arm {arms[place]})")
    return f"{table(Table(HEAD, rows(results)))}\n\nThe knee: {'; '.join(knees)}.\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots quality against each cost as SVG, with a dot for each seed and a ring around the knee.

    Args:
        results: from `with_costs`.
        path: the file.
    """
    with styled():
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), TIMES.items(), strict=True):
            for place, (score, name) in enumerate(SCORES.items()):
                pairs = [(run[cost], run[score]) for run in results if score in run]
                if pairs:
                    axes.plot(*zip(*sorted(pairs), strict=True), "o-", color=COLOURS[place], markersize=5, label=name)
            _, costs, scores = points(results, cost)
            place = knee(costs, scores)
            axes.plot(
                costs[place], scores[place], "o", markersize=13, color="black", markerfacecolor="none", label="knee"
            )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(ticks(min(costs), max(costs))))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
            axes.set_xlabel(label)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("macro exact match")
        figure.axes[0].set_ylim(0, 1)
        figure.axes[0].legend(frameon=False, loc="lower left")
        save(figure, path)
