"""Runs the comparison and writes its results: figures as JSON, tables as Markdown, loss curves as SVG."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.lab.peers.runs import CONTENDERS, run
from experiments.lab.peers.summaries import Record, markdown, rate, summary
from experiments.lab.peers.task import Task
from experiments.report.svg import save, styled
from experiments.run.files import write_json, write_text
from experiments.run.host.facts import machine

_COLOURS = ("#c25a10", "#7a4fa3", "#b8497f", "#1f6fb4", "#2c8a57")
_WINDOW = 4  # steps to average curves over, because batches of short and long rows differ


def compare(task: Task, work: Path, out: Path, *, python: Path, repeats: int) -> dict[str, Any]:
    """Runs missing measurements and writes the results.

    Args:
        task: settings of the task.
        work: folder of weights, text and single results.
        out: JSON file; `.md` and `.svg` files are written next to it.
        python: interpreter of the peers' environment.
        repeats: rounds.

    Returns:
        Contents of the JSON file.
    """
    facts = machine()
    rounds = run(task, work, python=python, repeats=repeats)
    figures = {
        "task": dataclasses.asdict(task),
        "repeats": repeats,
        "machine_facts": {**facts, "load_after": machine()["load"]},
        **summary(rounds, task.rows),
        "rounds": {name: [_short(record) for record in records] for name, records in rounds.items()},
    }
    write_json(out, figures)
    write_text(out.with_suffix(".md"), markdown(figures))
    plot(figures, out.with_suffix(".svg"))
    return figures


def _short(record: Record) -> dict[str, Any]:
    """A record with its rate instead of its steps."""
    short = {name: value for name, value in record.items() if name != "steps"}
    return short | ({"samples_per_second": rate(record)} if record["steps"] else {})


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Plots the loss of each contender over the common steps, as SVG.

    Args:
        figures: result of `compare`.
        path: the file.
    """
    losses = {name: each["losses"] for name, each in figures["contenders"].items() if "losses" in each}
    steps = min(map(len, losses.values()))
    with styled():
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.subplots()
        for colour, (name, values) in zip(_COLOURS, losses.items(), strict=True):
            smooth = smoothed(values[:steps], _WINDOW)
            axes.plot(range(1, steps + 1), smooth, color=colour, linewidth=1.4, label=CONTENDERS[name].label)
        axes.set_xlabel("step")
        axes.set_ylabel("KL(teacher || student) per token, nats")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        save(figure, path)


def smoothed(values: list[float], window: int) -> list[float]:
    """Returns the trailing mean over at most `window` values."""
    kept = [values[max(0, place + 1 - window) : place + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in kept]
