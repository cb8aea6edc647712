"""Compression without a recipe on tasks that no default was tuned on, beside a control of the student's shape."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.files import read_json
from data.metrics import most_frequent
from data.readers import read_records
from experiments.lab.tasks import charts, digits, photos, tables
from experiments.lab.tasks.writing import Draw, write
from experiments.run.files import write_json, write_text
from experiments.run.host.console import bar, count, say
from experiments.run.markdown import markdown_table
from experiments.run.schema.recipe import load_recipe
from pruning.costs import total_parameters

TESTED = 600
"""Test rows of a task."""
OPTIMIZER: dict[str, Any] = {
    "kind": "muon",
    "learning_rate": 2.5e-3,
    "warmup": 100,
    "b2": 0.98,
    "weight_decay": 0.1,
    "batch_size": 64,
}
"""The teachers' optimizer: as that of MAAD-synth's teacher, with more decay for fewer rows."""
GENTLE = OPTIMIZER["learning_rate"] / 3
"""Learning rate of all of a teacher: at the usual one, labels of few rows overwrite what the facts taught."""
HEAD = ("task", "family", "parameters", "student", "teacher's score", "student's", "scratch", "chance")


class Task(NamedTuple):
    """A task and its teacher.

    Attributes:
        draw: draws a record.
        preset: preset of the teacher.
        rows: number of training rows.
        steps: the teacher's steps of 64 on what pictures show.
        answers: its steps of 64 on answers, with a frozen image side.
        together: its steps of 64 on answers, of all of the model.
    """

    draw: Draw
    preset: str
    rows: int = 12_000
    steps: int = 1200
    answers: int = 2000
    together: int = 1000

    @property
    def sizes(self) -> dict[str, int]:
        """Split -> number of rows."""
        return {"train": self.rows, "test": TESTED}


TASKS = {
    "digits": Task(digits.record, "llava-tiny", rows=48_000, steps=2400, answers=3000, together=0),
    "charts": Task(charts.record, "blip2-opt-tiny", rows=24_000, answers=3000),
    "photos": Task(photos.record, "blip2-opt-tiny"),
    "tables": Task(tables.record, "llava-tiny", rows=48_000, steps=2400, answers=3000, together=0),
}


def run(name: str, folder: Path, out: Path, *, smaller: str, minutes: float) -> dict[str, Any]:
    """Trains a teacher on a task, compresses it without a recipe, and trains the control; finished parts are kept.

    Each part is a command of its own, as a user would give it.

    Args:
        name: a key of `TASKS`.
        folder: folder for rows and runs.
        out: JSON file with the results of all tasks; a table (.md) is written next to it.
        smaller: how many times fewer parameters the student has, such as "8x".
        minutes: duration of the compression.

    Returns:
        The content of the file: task -> figures.

    Raises:
        AntgmmError: a command failed.
    """
    task, place = TASKS[name], folder / name
    rows = place / "rows"
    with bar(f"{name}: rows", task.rows) as update:
        write(task.draw, rows, task.sizes, lambda file, done, _: update(done, file))
    # With the minutes, so that a run of another duration is not taken for this one.
    about = f"{smaller}-{minutes:g}m"
    teacher, student, scratch = (place / name for name in ("teacher", f"student-{about}", f"scratch-{about}"))
    _train(task, rows, teacher, {"preset": task.preset}, _teacher_phases(task))
    data = ["--data", f"{rows}/train.jsonl", "--test", f"{rows}/test.jsonl"]
    budget = ["--smaller", smaller, "--minutes", f"{minutes:g}"]
    _antgmm("compress", "--model", f"{teacher}/export", *data, *budget, "--run", f"{student}")
    whole, cut = (open_hf(each / "export")[0] for each in (teacher, student))
    shape = {"preset": task.preset, "sizes": sizes(cut)}
    report = _report(student)
    figures = read_json(out, "remove it and run it again") if out.exists() else {}
    figures[name] = {
        "family": cut.family,
        "minutes": minutes,
        "parameters": [total_parameters(config) for config in (whole, cut)],
        "sizes": shape["sizes"],
        "steps": [stage.steps for stage in load_recipe(student / "recipe.toml").stages],
        "teacher": report["teacher"]["scores"],
        "student": report["student"]["scores"],
        "chance": _chance(rows),
    }
    _save(figures, out)
    _train(task, rows, scratch, shape, control_phases(student))
    figures[name]["scratch"] = _report(scratch)["scores"]
    _save(figures, out)
    return figures


def _save(figures: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    write_json(out, figures)
    write_text(out.with_suffix(".md"), markdown(figures))


def _teacher_phases(task: Task) -> list[dict[str, Any]]:
    """What pictures show, then answers, first with a frozen image side, as the guide on a user's own data says."""
    phases = [
        {"name": "facts", "kind": "facts", "steps": task.steps},
        {"name": "answers", "kind": "answers", "steps": task.answers, "frozen": ["vision", "bridge"]},
        {
            "name": "together",
            "kind": "answers",
            "steps": task.together,
            "optimizer": {**OPTIMIZER, "learning_rate": GENTLE},
        },
    ]
    return [phase for phase in phases if phase["steps"]]


def control_phases(student: Path) -> list[dict[str, Any]]:
    """Returns the phases of a control with the steps, batches and optimizers of a student's stages.

    Args:
        student: folder of the student's run.
    """
    return [
        {
            "name": stage.name,
            "kind": "answers",
            "steps": stage.steps,
            "optimizer": dataclasses.asdict(stage.optimizer),
        }
        for stage in load_recipe(student / "recipe.toml").stages
    ]


def _train(task: Task, rows: Path, run: Path, model: Mapping[str, Any], phases: list[dict[str, Any]]) -> None:
    """Writes a recipe next to the folder of a run, and trains by it."""
    recipe = run.with_name(f"{run.name}.toml")
    tables = {
        "seed": 0,
        "checkpoint_every": 500,
        "buckets": [32],
        "model": dict(model),
        "data": {"kind": "jsonl", "path": f"{rows}/train.jsonl", "samples": task.rows},
        "optimizer": OPTIMIZER,
        "evaluate": {"max_new_tokens": 8, "data": {"path": f"{rows}/test.jsonl", "samples": TESTED}},
        "phase": phases,
    }
    write_text(recipe, tomli_w.dumps(tables))
    _antgmm("train", f"{recipe}", "--run", f"{run}")


def _antgmm(*words: str) -> None:
    """Runs a command in a process of its own, unless its run has a report."""
    run = Path(words[-1])
    if (run / "report" / "report.json").exists():
        say(f"{run} is finished")
        return
    say(f"antgmm {' '.join(words)}")
    code = subprocess.run([sys.executable, "-m", "experiments.cli", *words], check=False).returncode
    if code:
        raise AntgmmError(f"antgmm {words[0]} in {run} ended with code {code}: run the command again to go on")


def _report(run: Path) -> dict[str, Any]:
    return read_book(run / "report" / "report.json", "remove it and run the command again")


def _chance(rows: Path) -> float:
    """Mean over question types of the share of the most frequent answer."""
    records = read_records("jsonl", rows / "test.jsonl")
    words = records.expected()
    shares = most_frequent([row.type for row in words], [row.answer for row in words])
    return float(np.mean([*shares.values()]))


def table_rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Formats results as rows of a table with the columns `HEAD`."""
    for name, each in figures.items():
        scores = (each.get(which, {}).get("exact_match") for which in ("teacher", "student", "scratch"))
        shown = ("" if score is None else f"{score:.3f}" for score in scores)
        yield (name, each["family"], *map(count, each["parameters"]), *shown, f"{each['chance']:.3f}")


def markdown(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats results as a Markdown table."""
    return markdown_table(HEAD, table_rows(figures), texts=2) + "\n"
