"""The end of a run: what it has not learnt, and its result."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.commands.output import emit
from experiments.run.host.console import say

if TYPE_CHECKING:
    from experiments.run import schema

NEEDED = ("energy", "eval", "report")
"""Extras that every run needs; it checks for them before it starts."""


def places(run: Path, *reports: str) -> str:
    """Returns the paths of a run's reports and model."""
    shown = [f"report: {run / 'report' / name}" for name in reports]
    return "\n".join([*shown, f"model:  {run / 'export'}"])


def advise(recipe: "schema.Recipe | schema.Training", run: Path) -> None:
    """Says what a finished run has not learnt, and what to try."""
    from experiments.auto.advice import advice

    for line in advice(recipe, run):
        say(f"note: {line}")


def print_plan(recipe: Path, as_json: bool) -> None:
    """Prints where a plan was written and how to run it; as JSON with its tables."""
    from experiments.run.schema.recipe import read_toml

    lines = f"recipe: {recipe}\nto run it, as it is or edited: give the same command without --plan"
    emit({"path": str(recipe), "recipe": read_toml(recipe, "recipe")}, as_json, lines)


def print_result(figures: Mapping[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints the result of a run in the first process."""
    from antgmm_jax.parallel.processes import is_first

    if is_first():
        emit(figures, as_json, *shown)


def print_end(figures: Mapping[str, Any], run: Path, as_json: bool, *, as_report: bool) -> None:
    """Prints the result of a compression, with or without a report."""
    if as_report:
        print_comparison(figures, run, as_json)
    else:
        about = {**figures, "export": str(run / "export")}
        print_result(about, as_json, f"model: {run / 'export'}; report: antgmm report {run}")


def print_comparison(figures: Mapping[str, Any], run: Path, as_json: bool) -> None:
    """Prints a comparison of teacher and student."""
    from experiments.report.closing import summary

    print_result(figures, as_json, summary(figures), places(run, "report.html", "report.md"))
