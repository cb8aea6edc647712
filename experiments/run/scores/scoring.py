"""Evaluation of a model with a progress bar, for runs, reports and commands."""

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.processes import from_first_process, run_on_first
from antgmm_jax.pure import Params
from distill import fingerprint
from experiments.run.host.console import bar
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.scores.evaluation import evaluate
from experiments.run.start import Origin

STORED = "teacher-scores-*.json"
"""Names of the files of `teacher_scored`."""


def scored(
    title: str,
    config: LMMConfig,
    params: Params,
    records: Samples,
    processor: ProcessorMixin,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    dtype: str = "float32",
) -> tuple[dict[str, Any], list[str]]:
    """Evaluates a model; all processes of a run call it together.

    Args:
        title: title of the progress bar.
        config: model config.
        params: model parameters.
        records: encoded records.
        processor: processor of the model.
        max_new_tokens: maximum length of answers.
        batch_size: maximum number of questions per batch.
        dtype: dtype of computation.

    Returns:
        The result of `data.metrics.scores`, and the answers.
    """
    with bar(title, len(records), safe_point=preemption.leave) as update:
        return evaluate(
            config,
            params,
            records,
            processor,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            dtype=dtype,
            progress=update,
        )


def teacher_scored(cache: Path, recipe: Recipe, origin: Origin, test: Samples) -> tuple[dict[str, Any], list[str]]:
    """Evaluates the teacher of a recipe once; later calls read the result from a file.

    Args:
        cache: folder of caches, which several runs may share.
        recipe: the recipe.
        origin: teacher and processor.
        test: test records.

    Returns:
        Result of `scored`.
    """
    assert origin.teacher is not None
    limits = {"max_new_tokens": recipe.evaluate.max_new_tokens, "dtype": recipe.optimizer.dtype}
    key = fingerprint({}, f"{origin.key} {test.fingerprint} {limits}")[:16]
    place = cache / STORED.replace("*", key)
    if not from_first_process(place.exists):
        teacher = origin.teacher
        scores, answers = scored("teacher scores", teacher.config, teacher.weights(), test, origin.processor, **limits)
        run_on_first(lambda: write_book(place, {"scores": scores, "answers": answers}))
    stored = read_book(place)
    return stored["scores"], stored["answers"]
