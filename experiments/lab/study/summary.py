"""Results of a study as a table and a plot, with the spread over seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.as_markdown import table
from experiments.report.svg import save, styled
from experiments.report.tables import Table
from experiments.run.files import write_json, write_text

SCORES = {"exact_match": "test", "exact_match_hard": "test_hard"}
HEAD = ("arm", "seeds", "parameters", "training FLOPs", "exact match on test", "... on test_hard")
COLOURS = ("#1f6fb4", "#c25a10")


def by_arm(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups results by arm, in the order of the first result of each arm."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        grouped.setdefault(result["arm"], []).append(result)
    return grouped


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns a row for each arm.

    Args:
        results: result of `run_study`.

    Returns:
        Arm, seeds, parameters, training FLOPs, and the mean (with range) of each score.
    """
    table_rows = []
    for arm, runs in by_arm(results).items():
        first = runs[0]
        scores = (format_scores([run[score] for run in runs if score in run]) for score in SCORES)
        table_rows.append(
            (arm, str(len(runs)), f"{first['params'] / 1e3:.0f} k", f"{first['flops'] / 1e12:.1f} T", *scores)
        )
    return table_rows


def format_scores(values: Sequence[float]) -> str:
    """Formats the mean of scores, with the range if there are several."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the results, their table and their plot.

    Args:
        results: result of `run_study`; if empty, nothing is written.
        path: the JSON file; `.md` and `.svg` files are written next to it.
    """
    if results:
        write_json(path, results)
        write_text(path.with_suffix(".md"), markdown(results))
        plot(results, path.with_suffix(".svg"))


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown."""
    return table(Table(HEAD, rows(results))) + "\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the scores as SVG, with a dot for each seed and a bar at the mean.

    Args:
        results: result of `run_study`; at least one.
        path: the file.
    """
    arms = by_arm(results)
    with styled():
        figure = Figure(figsize=(7.0, 1.0 + 0.34 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for place, (score, name) in enumerate(SCORES.items()):
            colour, shift = COLOURS[place], 0.14 * (2 * place - 1)
            for row, runs in enumerate(arms.values()):
                values = [run[score] for run in runs if score in run]
                if not values:
                    continue
                label = name if row == 0 else None
                axes.plot(values, [row + shift] * len(values), "o", color=colour, alpha=0.65, markersize=5, label=label)
                axes.plot(
                    [np.mean(values)] * 2, [row + shift - 0.13, row + shift + 0.13], "-", color=colour, linewidth=2
                )
        axes.set_yticks(range(len(arms)), list(arms))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("macro exact match of the student (dots: seeds, bars: means)")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        save(figure, path)
