"""Measurements of a report: sizes, scores, latency, energy, the export gate and examples, as JSON types."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import from_dict
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import read_book
from antgmm_jax.pure import Params
from data.metrics import most_frequent, normal
from experiments.report.choices import choices
from experiments.report.model_times import answer_length, compared, stages_of, timed_dtype
from experiments.report.savings import kwh_a_year, payback
from experiments.report.sentences import ENGINES
from experiments.run.export.export_gate import GateResult
from experiments.run.folder import RunFolder
from experiments.run.host.allocator import return_freed_memory
from experiments.run.host.facts import machine
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import fingerprint
from experiments.run.scores.scoring import scored
from experiments.run.status import WHOLE
from experiments.run.student import Student

EXAMPLES = 12
VARIED = 0.5
"""Above this share of different answers, they may be free text, which exact match does not measure."""
ABOVE = 0.1
"""A teacher that is less than this above the most frequent answers does not know the task."""
RATES = (1, 100, 10_000)
"""Requests per second for which the report states the energy per year."""


class Scored(NamedTuple):
    """A model with its scores.

    Attributes:
        figures: sizes and scores, as JSON types.
        answers: answers to the test records.
    """

    figures: dict[str, Any]
    answers: list[str]


def score(
    name: str,
    model: Student,
    recipe: Recipe,
    test: Samples,
    hard: Samples | None,
    processor: ProcessorMixin,
    *,
    known: Callable[[], tuple[dict[str, Any], list[str]]] | None = None,
) -> Scored:
    """Evaluates a model; all processes of a run call it together.

    Args:
        name: "teacher" or "student".
        model: the model.
        recipe: recipe of the run.
        test: test records.
        hard: hard test records, or None.
        processor: processor of the model.
        known: returns scores and answers on the test records, if they are measured elsewhere.

    Returns:
        Its sizes and scores.
    """
    measured = known() if known else None
    params = model.load(recipe.optimizer.dtype) if measured is None or hard is not None else None
    scores, answers = measured or _scores(f"{name} scores", model.config, params, test, recipe, processor)
    figures = {**size_of(model.config, test), "exact_match": scores["exact_match"], "scores": scores}
    if hard is not None:
        scores, _ = _scores(f"{name} scores, hard", model.config, params, hard, recipe, processor)
        figures |= {"exact_match_hard": scores["exact_match"], "scores_hard": scores}
    del params
    return_freed_memory()
    return Scored(figures, answers)


def assembled(
    folder: RunFolder,
    recipe: Recipe,
    scored: Mapping[str, Scored],
    times: Mapping[str, Mapping[Any, Any]],
    test: Samples,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Assembles the report in a single process.

    Args:
        folder: folder of the run.
        recipe: recipe of the run.
        scored: teacher and exported student.
        times: from `latencies`; empty if latency was not measured.
        test: test records.

    Returns:
        The report as JSON types, and the images of its examples, uint8 [H, W, 3] each.
    """
    models = {name: model.figures for name, model in scored.items()}
    answers = {name: model.answers for name, model in scored.items()}
    latency, chosen = compared(times, test, timed_dtype(recipe)), choose(test, answers)
    scores = models["teacher"]["scores"]
    report = {
        "recipe": fingerprint(recipe),
        "seed": recipe.seed,
        "machine": machine(),
        "free_text": is_free_text(test, scores),
        "choices": choices(folder.path, recipe, len(scores["by_type"])),
        **models,
        "ratios": {
            "params": models["teacher"]["params"] / models["student"]["params"],
            **{engine: latency[engine]["teacher_ms"] / latency[engine]["student_ms"] for engine in times},
        },
        "latency": latency,
        "export": export_figures(read_book(folder.gate)),
        "stages": [
            stage_figures(stage, test, times["jax"][stage] if times else None) for stage in stages_of(folder, recipe)
        ],
        "examples": [example(test, answers, index, place) for place, index in enumerate(chosen, 1)],
        "wall_seconds": folder.status.seconds,
        "energy": energy_figures(folder, latency),
    }
    return report, [shown(test.records[index].images) for index in chosen]


def _scores(
    title: str, config: LMMConfig, params: Params, samples: Samples, recipe: Recipe, processor: ProcessorMixin
) -> tuple[dict[str, Any], list[str]]:
    limits = {"max_new_tokens": recipe.evaluate.max_new_tokens, "dtype": recipe.optimizer.dtype}
    return scored(title, config, params, samples, processor, **limits)


def size_of(config: LMMConfig, test: Samples) -> dict[str, Any]:
    """Returns parameters, and FLOPs of a request with the mean length and image slots of the test records."""
    length, slots = int(test.rows.index.prompt.mean().round()), float(test.rows.index.slots.mean())
    cost = pruning.cost(config, 1, length, answer_length(test), itemsize=4, slots=slots)
    return {
        "params": sum(cost.parameters.values()),
        "params_by_tower": cost.parameters,
        "flops": sum(sum(towers.values()) for towers in cost.flops.values()),
        "flops_by_phase": {phase: sum(towers.values()) for phase, towers in cost.flops.items()},
        "kv_cache_bytes": cost.kv_cache,
    }


def is_free_text(test: Samples, scores: Mapping[str, Any]) -> bool:
    """Whether ROUGE-L says more about the answers than exact match.

    Args:
        test: test records.
        scores: scores of the teacher on them.

    Returns:
        Whether most answers are different, and the teacher repeats hardly more of them word by word than the most
        frequent ones would; of few records, of which each is frequent, hardly more than half of them.
    """
    words = test.records.expected()
    answers = [normal(row.answer) for row in words]
    guessed = float(np.mean([*most_frequent([row.type for row in words], answers).values()]))
    varied = len({*answers}) > VARIED * len(answers)
    return varied and scores["exact_match"] < min(guessed, 0.5) + ABOVE


def export_figures(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the figures of the export gate for the report."""
    names = ("max_abs_logit_diff", "max_abs_logit", "torch_rounding", "answers_equal", "ties", "prompts", "passed")
    result = GateResult(**gate)._asdict()
    return {name: result[name] for name in names}


def energy_figures(folder: RunFolder, latency: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the energy that the run used and the energy that its student saves.

    Args:
        folder: folder of the run.
        latency: from `compared`.

    Returns:
        The energy of the whole `run` so far and, if there is one, of the teacher `cache`; and `saved` per engine:
        `joules` per request, `kwh_a_year` at each of `RATES`, and `payback`, the number of requests after which the
        savings equal the energy of the run, None if there are no savings.
    """
    used, saved = folder.status.energy, {}
    for engine in [name for name in ENGINES if name in latency]:
        teacher, student = (latency[engine][name]["energy"]["joules"] for name in ("teacher", "student"))
        saved[engine] = {
            "joules": teacher - student,
            "kwh_a_year": {str(rate): kwh_a_year(teacher - student, rate) for rate in RATES},
            "payback": payback(used[WHOLE].kwh, teacher - student),
        }
    return {"saved": saved, **{part: used[part]._asdict() for part in (WHOLE, "cache") if part in used}}


def stage_figures(directory: Path, test: Samples, latency: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns sizes, losses, scores and latency of a finished stage.

    Args:
        directory: folder of the stage, `stages/NN-name`.
        test: test records.
        latency: milliseconds by phase and energy of a request in JAX; None if not measured.

    Returns:
        JSON types; `history` is the loss curve, `energy` includes all attempts at the stage.
    """
    record = checkpoint.load_record(directory)
    history = record["metrics"]["history"]
    return {
        "name": record["stage"]["name"],
        "sizes": record["stage"]["sizes"],
        **size_of(from_dict(record["config"]), test),
        "exact_match": record["metrics"]["scores"]["exact_match"],
        "scores": record["metrics"]["scores"],
        "latency": latency,
        "loss_first": history[0]["loss"] if history else None,
        "loss_last": history[-1]["loss"] if history else None,
        "history": history,
        "energy": record["metrics"]["energy"],
    }


def choose(test: Samples, answers: Mapping[str, Sequence[str]], count: int = EXAMPLES) -> list[int]:
    """Chooses examples for the report: if possible, half of them answered wrongly by the student.

    Args:
        test: test records.
        answers: model -> answers, with the key "student".
        count: maximum number of examples.

    Returns:
        Record numbers, wrong answers first.
    """
    references = (test.records.words(row).answer for row in range(len(test)))
    correct = [normal(a) == normal(reference) for a, reference in zip(answers["student"], references, strict=True)]
    wrong, right = ([index for index, value in enumerate(correct) if value is kind] for kind in (False, True))
    wrong = wrong[: max(count // 2, count - len(right))]
    return [*wrong, *right[: count - len(wrong)]]


def shown(images: Sequence[np.ndarray]) -> np.ndarray:
    """Joins the images of a record side by side, uint8 [H, W, 3]; a white pixel if there are none."""
    if not images:
        return np.full((1, 1, 3), 255, np.uint8)
    high = max(len(image) for image in images)
    return np.hstack([np.pad(x, ((0, high - len(x)), (0, 0), (0, 0)), constant_values=255) for x in images])


def example(test: Samples, answers: Mapping[str, Sequence[str]], index: int, place: int) -> dict[str, Any]:
    """Returns a record as an example: with the answers of both models and the path of its image."""
    record = test.records.words(index)
    replies = {name: answers[name][index] for name in ("teacher", "student")}
    return {
        "id": record.id,
        "type": record.type,
        "question": record.question,
        "text": record.text,
        "answer": record.answer,
        **replies,
        **{f"{name}_right": normal(text) == normal(record.answer) for name, text in replies.items()},
        "picture": f"ads/{place:02d}.png",
    }
