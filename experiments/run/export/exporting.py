"""The export of a run: written and checked once, from the final model."""

from pathlib import Path

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.io.folders import checksums, verify
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.memory import device_memory
from antgmm_jax.parallel.processes import from_first_process, run_on_first
from experiments.run.batch_size import answering
from experiments.run.export.card import CARD, origin_of
from experiments.run.export.publishing import Questions, publish
from experiments.run.export.served_prompt import CHECKED, conversations
from experiments.run.folder import REPORT, RunFolder
from experiments.run.progress.forecast import GATE_PROMPTS
from experiments.run.rows.prompts import prompt_of
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe, Training
from experiments.run.start import Origin
from experiments.run.student import Student, whole
from experiments.run.training import save_processor
from pruning.costs import total_parameters


def exported(recipe: Recipe | Training, folder: RunFolder, origin: Origin, student: Student, test: Samples) -> Student:
    """Exports the final model of a run unless that is done, and opens the files.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        origin: what the run started from.
        student: the final model.
        test: test records, the first of which are the questions of the export gate.

    Returns:
        The model of the files.

    Raises:
        AntgmmError: the export gate failed, or files of an earlier export were changed.
    """

    def is_there() -> bool:
        checked = folder.gate.exists() or origin.teacher is None
        return checked and folder.checksums.exists() and folder.export.exists()

    if from_first_process(is_there):
        run_on_first(lambda: verify(folder.export, read_book(folder.checksums)))
        return whole(folder.export)._replace(keep=student.keep)
    run_on_first(lambda: forget(folder))
    like = Path(recipe.start or folder.path / "processor")
    if not recipe.start:
        run_on_first(lambda: save_processor(origin.processor, like, student.config))
    result = publish(
        student.config,
        student.weights(),
        folder.export,
        like,
        dtype=recipe.export.dtype,
        prompt=prompt_of(recipe),
        origin=origin_of(recipe),
        questions=_questions(recipe, student.config, test) if origin.teacher else None,
    )

    def note() -> None:
        # Without the card: the report adds scores to it.
        write_book(folder.checksums, {name: of for name, of in checksums(folder.export).items() if name != CARD})
        if result is not None:
            write_book(folder.gate, result._asdict())

    run_on_first(note)
    return whole(folder.export)._replace(keep=student.keep)


def forget(folder: RunFolder) -> None:
    """Removes the records of an export that will be out of date, and the figures of its report.

    Args:
        folder: folder of the run.
    """
    for record in (folder.report / REPORT, folder.gate, folder.checksums):
        record.unlink(missing_ok=True)


def _questions(recipe: Recipe | Training, config: LMMConfig, test: Samples) -> Questions:
    """Questions for the export gate: the first test records, in batches for one device."""
    longest = recipe.evaluate.max_new_tokens
    # The parameters in the dtype of the files stay beside those in float32.
    beside = 0 if recipe.export.dtype == "float32" else 2 * total_parameters(config)
    with sharding.without_mesh():
        fits = answering(config, 64, longest, memory=device_memory() - beside)
        questions = [*test.questions(fits, GATE_PROMPTS)]
    batches = [{**batch, "id": np.array(test.names(batch["index"]))} for batch in questions]
    return Questions(batches, longest, *test.end_tokens, conversations(test, CHECKED))
