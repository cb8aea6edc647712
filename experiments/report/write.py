"""Writes the report of a run: report.json, example images, report.md and report.html."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import as_json, read_book, write_book
from antgmm_jax.io.files import one_line
from antgmm_jax.io.folders import Unwritten
from antgmm_jax.parallel.processes import from_first_process, run_on_first
from experiments.report.as_html import page
from experiments.report.as_markdown import markdown
from experiments.report.figures import assembled, score
from experiments.report.model_times import latencies
from experiments.report.sentences import Report
from experiments.run.export.card import Score, described, origin_of, title_of, write_card
from experiments.run.export.export_gate import GateResult
from experiments.run.files import write_bytes, write_text
from experiments.run.folder import REPORT, RunFolder
from experiments.run.host.console import say
from experiments.run.pipeline import Outcome, Run
from experiments.run.rows.prompts import prompt_of
from experiments.run.schema import Recipe, Training
from experiments.run.scores.scoring import scored
from experiments.run.status import WHOLE
from pruning.costs import total_parameters

FORMAT = 5
"""Format version of report.json; other versions cannot be rendered."""

AGAIN = "run the command of the run again"
"""What to do if report.json is damaged."""

PICTURE_SIDE = 320
"""Maximum side of an example image in pixels."""


def finish(run: Run, *, report: bool = True, again: bool = False) -> dict[str, Any]:
    """Starts or resumes a run, completes it and writes its report, unless that is written already.

    Args:
        run: the run.
        report: whether to evaluate and time the models for a report; it can be made later.
        again: whether to evaluate and time the models even if the report is complete.

    Returns:
        The report as JSON types; empty without a report.

    Raises:
        AntgmmError: as in `Run.exported`.
    """
    with run.exported() as outcome:
        if not report:
            return {}
        folder, compressed = outcome.folder, isinstance(outcome.recipe, Recipe)
        if not again and from_first_process(lambda: _is_written(folder.report, compressed)):
            say(f"report: complete in {folder.report}; to measure again: antgmm report {folder.path} --again")
            return read_book(folder.report / REPORT, AGAIN)
        return write_report(outcome) if compressed else write_teacher_report(outcome)


def _is_written(directory: Path, compressed: bool) -> bool:
    """Whether a folder holds the report of the export, which is removed before another model is exported.

    Args:
        directory: folder `report/` of the run.
        compressed: whether the run has a teacher; the pages of its report are then rendered again.
    """
    try:
        report = read_book(directory / REPORT, AGAIN)
        if compressed:
            render(directory, report)
    except Unwritten:
        raise
    except AntgmmError:  # it is absent, damaged, or of another version
        return False
    return True


def write_teacher_report(outcome: Outcome) -> dict[str, Any]:
    """Evaluates an exported model that was trained without a teacher, and writes only report.json.

    Args:
        outcome: result of the run.

    Returns:
        Size, seconds and energy, as JSON types; and scores if its last phase trains answers.
    """
    folder, recipe, model = outcome.folder, outcome.recipe, outcome.student
    assert isinstance(recipe, Training)
    place, size = folder.report / REPORT, total_parameters(model.config)
    scores = {}
    if recipe.answers:
        limits = {"max_new_tokens": recipe.evaluate.max_new_tokens, "dtype": recipe.optimizer.dtype}
        scores, _ = scored("scores", model.config, model.weights(), outcome.test, outcome.processor, **limits)

    def write() -> None:  # only the first process measures energy
        energy = folder.status.energy[WHOLE]._asdict()
        figures = {"params": size, "seed": recipe.seed, "wall_seconds": folder.status.seconds, "energy": energy}
        _write_card(outcome, [Score(described(recipe.evaluate.data), scores)] if scores else [])
        write_book(place, figures | ({"scores": scores} if scores else {}))

    run_on_first(write)
    return read_book(place, AGAIN)


def write_report(outcome: Outcome) -> dict[str, Any]:
    """Evaluates teacher and exported student, measures latency and energy if wanted, and writes `report/`.

    One model at a time is in memory.

    Args:
        outcome: result of the run.

    Returns:
        The report as JSON types.
    """
    folder, recipe, teacher, student, test, hard, processor, teacher_scored = outcome
    assert isinstance(recipe, Recipe) and teacher is not None
    scored = {
        "teacher": score("teacher", teacher, recipe, test, hard, processor, known=teacher_scored),
        "student": score("student", student, recipe, test, hard, processor),
    }
    times = latencies(folder, recipe, teacher, student, test) if recipe.report.latency else {}
    sets = {"scores": recipe.evaluate.data, "scores_hard": recipe.hard}
    cards = [
        Score(described(data), *(scored[name].figures[key] for name in ("student", "teacher")))
        for key, data in sets.items()
        if data is not None
    ]

    def write() -> None:
        _write_card(outcome, cards)
        _write(folder, assembled(folder, recipe, scored, times, test))

    run_on_first(write)
    return read_book(folder.report / REPORT, AGAIN)


def _write(folder: RunFolder, measured: tuple[dict[str, Any], list[np.ndarray]]) -> None:
    """Writes the pages, and at last the figures: with them the report is complete."""
    figures, pictures = measured
    report = as_json({"format": FORMAT, **figures})
    for example, picture in zip(report["examples"], pictures, strict=True):
        write_bytes(folder.report / example["picture"], png(picture))
    render(folder.report, report)
    write_book(folder.report / REPORT, report)


def _write_card(outcome: Outcome, scores: list[Score]) -> None:
    """Writes the model card again, with scores and the result of the export gate."""
    folder, recipe, config = outcome.folder, outcome.recipe, outcome.student.config
    write_card(
        folder.export,
        config,
        origin_of(recipe),
        prompt_of(recipe),
        title=title_of(folder.export),
        gate=GateResult(**read_book(folder.gate)) if outcome.teacher else None,
        scores=scores,
    )


def render(directory: Path, report: Report) -> str:
    """Writes report.md and report.html.

    Args:
        directory: folder `report/` of the run, with the example images.
        report: contents of its `report.json`.

    Returns:
        The Markdown.

    Raises:
        AntgmmError: the report has another format version.
    """
    if report.get("format") != FORMAT:
        raise AntgmmError(f"{directory / REPORT} was written by another version: {AGAIN}, or antgmm report RUN --again")
    with one_line(lambda: f"{directory / REPORT} is damaged", AGAIN):
        text, html = markdown(report), page(report, directory)
    write_text(directory / "report.md", text)
    write_text(directory / "report.html", html)
    return text


def png(picture: np.ndarray) -> bytes:
    """Encodes an image as PNG, with sides of at most `PICTURE_SIDE`.

    Args:
        picture: uint8 [H, W, 3].

    Returns:
        Contents of the file.
    """
    image, content = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(content, "PNG")
    return content.getvalue()
