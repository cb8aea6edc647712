"""Arms as points of one curve: quality against how many times smaller and faster, and where it bends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from experiments.lab.planning.rates import ROUNDS, Asked, random_request
from experiments.lab.study.summary import COLOURS, SCORES, by_arm, told, write_json_results
from experiments.report.as_markdown import table
from experiments.report.latency import measure
from experiments.report.plots import ticks
from experiments.report.svg import save, styled
from experiments.report.tables import Table
from experiments.run.folder import write_text
from pruning.costs import total_parameters

TIMES = {"smaller": "times fewer parameters", "faster": "times lower latency in JAX"}
HEAD = ("arm", "parameters", *TIMES.values(), *(f"exact match on {name}" for name in SCORES.values()))


def with_costs(results: Sequence[dict[str, Any]], teacher: LMMConfig, asked: Asked) -> list[dict[str, Any]]:
    """Results with what each student saves; all shapes and the teacher's are timed in turn, in one run.

    Args:
        results: what `run_study` found; `sizes` and `params` of each are read.
        teacher: the model that all were cut from.
        asked: the request that is timed, at batch 1.

    Returns:
        The results with `smaller` and `faster`, ratios to the teacher, and `latency_ms`.
    """
    shapes = [shape_of(teacher, result) for result in results]
    times = measure(
        {shape: random_request(shape, asked) for shape in {teacher: 0, **dict.fromkeys(shapes)}}, repeats=ROUNDS
    )
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
    """The model that a run left.

    Sizes alone do not say which of a bridge's layers read the picture; the number of parameters does.

    Args:
        teacher: the model that it was cut from.
        result: of the run; `sizes` and `params` are read.

    Returns:
        Its config.

    Raises:
        AntgmmError: no model of these sizes has so many parameters.
    """
    for shape in pruning.planned_configs(teacher, result["sizes"]):
        if total_parameters(shape) == result["params"]:
            return shape
    raise AntgmmError(f"arm {result['arm']!r}: no model of its sizes has {result['params']} parameters: run it again")


def knee(costs: Sequence[float], scores: Sequence[float]) -> int:
    """The point after which quality falls faster: farthest above the line from the first point to the last.

    Costs count by their logarithm (Kneedle, Satopaa et al. 2011, without smoothing).

    Args:
        costs: > 0, how many times smaller or faster; at least two that differ.
        scores: quality of each.

    Returns:
        Its place in the sequences.
    """
    x, y = np.log(np.asarray(costs, float)), np.asarray(scores, float)
    low, high = np.argmin(x), np.argmax(x)
    line = y[low] + (y[high] - y[low]) * (x - x[low]) / (x[high] - x[low])
    return int(np.argmax(y - line))


def points(results: Sequence[dict[str, Any]], cost: str) -> tuple[list[str], list[float], list[float]]:
    """Arms, their cost and their mean score on `test`."""
    arms = by_arm(results)
    means = [float(np.mean([run["exact_match"] for run in runs])) for runs in arms.values()]
    return list(arms), [runs[0][cost] for runs in arms.values()], means


def write_curve(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the results, their table with the knees named, and their plot.

    Args:
        results: from `with_costs`.
        path: the JSON file; the others have its name with `.md` and `.svg`.
    """
    write_json_results(results, path)
    write_text(path.with_suffix(".md"), markdown(results))
    plot(results, path.with_suffix(".svg"))


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each arm: parameters, ratios to the teacher, scores."""
    return [
        (
            arm,
            f"{runs[0]['params'] / 1e3:.0f} k",
            *(f"{runs[0][cost]:.1f}x" for cost in TIMES),
            *(told([run[score] for run in runs if score in run]) for score in SCORES),
        )
        for arm, runs in by_arm(results).items()
    ]


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, and which arm is the knee by each cost."""
    knees = []
    for cost, label in TIMES.items():
        arms, costs, scores = points(results, cost)
        place = knee(costs, scores)
        knees.append(f"by {label} at {costs[place]:.1f}x (arm {arms[place]})")
    return f"{table(Table(HEAD, rows(results)))}\n\nThe knee: {'; '.join(knees)}.\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes an SVG: quality against each cost, a dot for each seed, a ring around the knee.

    Args:
        results: from `with_costs`.
        path: the file.
    """
    with styled():
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), TIMES.items(), strict=True):
            for place, (score, name) in enumerate(SCORES.items()):
                found = [(run[cost], run[score]) for run in results if score in run]
                if found:
                    axes.plot(*zip(*sorted(found), strict=True), "o-", color=COLOURS[place], markersize=5, label=name)
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
