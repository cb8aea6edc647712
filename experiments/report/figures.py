"""Measurements of a report: sizes, scores, latency, energy, the export gate and examples, as JSON types."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import ProcessorMixin

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import from_dict
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.processes import gather
from antgmm_jax.parallel.sharding import active
from antgmm_jax.pure import Params
from data.metrics import normal
from experiments.report.latency import Served, compare
from experiments.report.savings import kwh_a_year, payback
from experiments.run.folder import WHOLE, RunFolder
from experiments.run.host.facts import machine
from experiments.run.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import fingerprint
from experiments.run.scoring import scored

LATENCY_REPEATS = 30
EXAMPLES = 12
RATES = (1, 100, 10_000)
"""Requests per second for which the report states the energy per year."""


StageModels = dict[Path, tuple[LMMConfig, Params]]
"""Folder of a finished stage -> config and parameters of its student, on the host."""


class Scored(NamedTuple):
    """A model with its scores.

    Attributes:
        config: model config.
        params: parameters, usable by a single process.
        figures: sizes and scores, as JSON types.
        answers: answers to the test records.
    """

    config: LMMConfig
    params: Params
    figures: dict[str, Any]
    answers: list[str]


def score(
    name: str, model: Any, recipe: Recipe, test: Samples, hard: Samples | None, processor: ProcessorMixin
) -> Scored:
    """Evaluates a model; all processes of a run call it together.

    Args:
        name: "teacher" or "student".
        model: a `Student`.
        recipe: recipe of the run.
        test: test records.
        hard: hard test records, or None.
        processor: processor of the model.

    Returns:
        The model with its sizes and scores.
    """
    scores, answers = _scores(f"{name} scores", model, test, recipe, processor)
    figures = {**size_of(model.config, test), "exact_match": scores["exact_match"], "scores": scores}
    if hard is not None:
        scores, _ = _scores(f"{name} scores, hard", model, hard, recipe, processor)
        figures |= {"exact_match_hard": scores["exact_match"], "scores_hard": scores}
    return Scored(model.config, gather(model.params) if active() else model.params, figures, answers)


def measure(
    folder: RunFolder, recipe: Recipe, scored: Mapping[str, Scored], stages: StageModels, test: Samples
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Measures latency and energy in a single process and assembles the report.

    Args:
        folder: folder of the run.
        recipe: recipe of the run.
        scored: teacher and exported student.
        stages: from `stage_models`.
        test: test records.

    Returns:
        The report as JSON types, and the images of its examples, uint8 [H, W, 3] each.
    """
    teacher, student = scored["teacher"], scored["student"]
    models = {name: model.figures for name, model in scored.items()}
    answers = {name: model.answers for name, model in scored.items()}
    latency, stage_latency = measure_latency(recipe.teacher.path, folder.export, teacher, student, stages, test)
    chosen = choose(test, answers)
    report = {
        "recipe": fingerprint(recipe),
        "seed": recipe.seed,
        "machine": machine(),
        **models,
        "ratios": {
            "params": models["teacher"]["params"] / models["student"]["params"],
            **{engine: latency[engine]["teacher_ms"] / latency[engine]["student_ms"] for engine in ("jax", "torch")},
        },
        "latency": latency,
        "export": export_figures(json.loads((folder.report / "gate.json").read_text())),
        "stages": [stage_figures(stage, test, times) for stage, times in zip(stages, stage_latency, strict=True)],
        "examples": [example(test, answers, index, place) for place, index in enumerate(chosen, 1)],
        "wall_seconds": folder.seconds,
        "energy": energy_figures(folder, latency),
    }
    return report, [shown(test.records[index].images) for index in chosen]


def _scores(
    title: str, model: Any, samples: Samples, recipe: Recipe, processor: ProcessorMixin
) -> tuple[dict[str, Any], list[str]]:
    longest = recipe.evaluate.max_new_tokens
    return scored(title, model.config, model.params, samples, processor, max_new_tokens=longest)


def size_of(config: LMMConfig, test: Samples) -> dict[str, Any]:
    """Returns parameters, and FLOPs of a request of mean length, by tower and phase."""
    length = int(test.rows.index.prompt.mean().round())
    cost = pruning.cost(config, 1, length, answer_length(test), itemsize=4)
    return {
        "params": sum(cost.parameters.values()),
        "params_by_tower": cost.parameters,
        "flops": sum(sum(towers.values()) for towers in cost.flops.values()),
        "flops_by_phase": {phase: sum(towers.values()) for phase, towers in cost.flops.items()},
        "kv_cache_bytes": cost.kv_cache,
    }


def answer_length(test: Samples) -> int:
    """Returns the median length of the last answers in tokens, including the end token."""
    return int(np.median(test.rows.index.answer))


def measure_latency(
    teacher_dir: str, student_dir: Path, teacher: Any, student: Any, stages: StageModels, test: Samples
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures the latency of requests at batch 1 in JAX and PyTorch, alternating between models.

    Args:
        teacher_dir: Hugging Face folder of the teacher.
        student_dir: folder of the exported student.
        teacher: the teacher in JAX.
        student: the student in JAX.
        stages: students of the finished stages; they are measured in JAX only.
        test: test records; the first one is the request.

    Returns:
        Milliseconds by engine, model and phase and the energy of a request, with the medians also as `<model>_ms` for
        scripts, and the answer length `tokens`; and the latency of each stage.
    """
    prompt, tokens = _request(test), answer_length(test)
    models: dict[Any, Served] = {
        "teacher": Served(teacher.config, teacher.params, teacher_dir, prompt),
        **{stage: Served(*model, None, prompt) for stage, model in stages.items()},
        "student": Served(student.config, student.params, student_dir, prompt),
    }
    times = compare(models, tokens, LATENCY_REPEATS)
    latency: dict[str, Any] = {"tokens": tokens}
    for engine in ("jax", "torch"):
        pair = {name: times[engine][name] for name in ("teacher", "student")}
        latency[engine] = {**pair, **{f"{name}_ms": times_of["p50"] for name, times_of in pair.items()}}
    return latency, [times["jax"][stage] for stage in stages]


def _request(test: Samples) -> dict[str, Any]:
    """The first record as a request, without padding."""
    batch = next(test.in_order(1, prompts=True))
    length = int(batch["prompt/attention_mask"].sum())
    start = 0 if batch["prompt/attention_mask"][0, 0] else -length
    text = {name: batch[f"prompt/{name}"][:, start:][:, :length] for name in ("input_ids", "attention_mask")}
    return {"images": batch["images"], **text}


def stage_models(folder: RunFolder, recipe: Recipe) -> StageModels:
    """Loads the students of all stages; all processes of a run call it together."""
    models = {}
    for number, stage in enumerate(recipe.stages, 1):
        directory = folder.stage(number, stage.name)
        tree, record = checkpoint.load_stage(directory)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree["params"])
        models[directory] = from_dict(record["config"]), params
    return models


def export_figures(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the figures of the export gate for the report."""
    names = ("max_abs_logit_diff", "max_abs_logit", "torch_rounding", "answers_equal", "prompts", "passed")
    return {name: gate[name] for name in names}


def energy_figures(folder: RunFolder, latency: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the energy that the run used and the energy that its student saves.

    Args:
        folder: folder of the run.
        latency: from `measure_latency`.

    Returns:
        The energy of the whole `run` so far and, if there is one, of the teacher `cache`; and `saved` per engine:
        `joules` per request, `kwh_a_year` at each of `RATES`, and `payback`, the number of requests after which the
        savings equal the energy of the run, None if there are no savings.
    """
    used, saved = folder.energy, {}
    for engine in ("jax", "torch"):
        teacher, student = (latency[engine][name]["energy"]["joules"] for name in ("teacher", "student"))
        saved[engine] = {
            "joules": teacher - student,
            "kwh_a_year": {str(rate): kwh_a_year(teacher - student, rate) for rate in RATES},
            "payback": payback(used[WHOLE].kwh, teacher - student),
        }
    return {"saved": saved, **{part: used[part]._asdict() for part in (WHOLE, "cache") if part in used}}


def stage_figures(directory: Path, test: Samples, latency: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sizes, losses, scores and latency of a finished stage.

    Args:
        directory: folder of the stage, `stages/NN-name`.
        test: test records.
        latency: milliseconds by phase and energy of a request in JAX.

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
