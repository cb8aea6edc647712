"""Forecast of a run: its parts, and an estimate of their durations on this machine.

Estimates use analytic FLOPs (`pruning.costs`, `experiments.run.progress.flops`) and the measured rate of a matrix
product. The constants were fitted to `antgmm demo` on two cores; on other hardware they are only a guess.
"""

import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import IMAGE_SIDE, LMMConfig
from antgmm_jax.parallel import sharding
from data.encoding import Encoder
from data.limits import BadRow
from data.making import in_threads
from data.record import Arrays
from data.source import Source, evenly
from data.store import MOST_BYTES, THREADS, open_if_encoded
from experiments.run.cuts import weighs_tokens
from experiments.run.host.console import clock, count, say
from experiments.run.progress.flops import StageFlops, pass_flops, stage_flops, update_flops
from experiments.run.schema import Recipe, Training
from pruning.costs import total_parameters

SHARE = 0.5
"""Rate of train steps and forward passes relative to that of a matrix product."""
CALL, COMPILE, CLOSE = 3e-3, 5.0, 40.0
"""Seconds in addition to FLOPs: per batch, per compiled program, and for the export gate of a small model."""
GATE_PROMPTS = 320
"""Prompts of the export gate, in JAX and in PyTorch; fewer if there are fewer test records."""
TIMED = 100
"""Requests of a model while its latency and energy are measured, in JAX and PyTorch."""
BATCH, SCORES, TARGETS, REPORT = 64, "scores after ", "teacher cache", "report"
_PROBED = 16
_SIDE, _LARGE = 1024, 8192
"""Side of the matrices of a measured product, on a CPU and on accelerators: there, a small one takes as long as its
call."""


class Part(NamedTuple):
    """A part of a run.

    Attributes:
        title: title, as in progress messages.
        work: short description.
        flops: FLOPs of its matrix products.
        batches: number of batches.
        seconds: additional seconds.
        ahead: seconds of reading batches while the device computes.
    """

    title: str
    work: str
    flops: float = 0.0
    batches: float = 0.0
    seconds: float = COMPILE
    ahead: float = 0.0


class Rows(NamedTuple):
    """Statistics of the data of a run.

    Attributes:
        trained: number of training records.
        scored: number of test records.
        hard: number of hard test records.
        prompt: mean number of prompt tokens, including image tokens.
        answer: mean number of answer tokens.
        slots: mean number of image slots.
        read: seconds to read and encode a record.
        unread: number of training records that are not encoded yet.
        decode: seconds to decode the pictures of a record each time it is used; 0 if encoded pictures are kept.
    """

    trained: int
    scored: int
    hard: int
    prompt: int
    answer: int
    slots: float
    read: float
    unread: int
    decode: float = 0.0


def look_at(source: Source, encoder: Encoder) -> dict[str, Any]:
    """Measures mean lengths and the time to encode a record.

    Args:
        source: the records.
        encoder: encoder of the model.

    Returns:
        `prompt`, `answer`, `slots`, `read`, `unread` and `decode` for `Rows`, from some records all over the source,
        which may be sorted; the lengths of all if they are encoded. Empty if all of these records are invalid.
    """
    stored = open_if_encoded(source, encoder)
    alone = stored is not None and source.encoded(encoder) is not None  # without pictures that could be encoded

    def one(index: int) -> Arrays | None:
        with suppress(BadRow):  # reported when all records are read
            return stored[index] if stored is not None and alone else encoder(source.read(index))

    if not len(source):
        return {}
    first, *others = map(int, evenly(len(source), _PROBED))
    threads = 1 if source.drawn else THREADS  # as they are encoded
    begin = time.perf_counter()
    tried = [one(first)]  # which also loads libraries
    if others:
        begin = time.perf_counter()
        tried += in_threads(one, threads, others)
    read = (time.perf_counter() - begin) / max(1, len(others))
    if not (encoded := [row for row in tried if row is not None]):
        return {}
    if stored is not None:
        lengths = {name: getattr(stored.index, name) for name in ("prompt", "answer", "slots")}
    else:
        lengths = {name: [len(row[name]) for row in encoded] for name in ("prompt", "answer")}
        lengths["slots"] = [next((len(leaf) for leaf in row["images"].values()), 0) for row in encoded]
    means = {name: float(np.mean(each)) for name, each in lengths.items()}
    tokens = {name: int(np.ceil(means[name])) for name in ("prompt", "answer")}
    if stored is not None:
        kept, unread = stored.kept, 0
    else:
        pixels = sum(leaf.nbytes for row in encoded for leaf in row["images"].values()) / len(encoded)
        kept, unread = source.drawn or pixels * len(source) <= MOST_BYTES, len(source)
    # Most of the time of reading a record with pictures is that of decoding them.
    return {**tokens, "slots": means["slots"], "read": read, "unread": unread, "decode": 0.0 if kept else read}


def parts(recipe: Recipe | Training, start: LMMConfig, rows: Rows, teacher: LMMConfig | None = None) -> list[Part]:
    """Returns the parts of a run, in order.

    Args:
        recipe: the recipe.
        start: config of the initial model.
        rows: statistics of the data.
        teacher: config of the teacher, if it is not the initial model.

    Returns:
        The parts.
    """
    questions = rows.scored + rows.hard
    records = rows.unread + questions
    taught = teacher or start
    result = [Part("reading", f"{records} records", seconds=records * rows.read), *_cache(recipe, taught, rows)]
    stages = [*stage_flops(start, recipe, **_lengths(rows))]
    for stage in stages:
        if isinstance(recipe, Recipe) and weighs_tokens(taught, stage.work.stage):
            result.append(_weighing(recipe, stage, taught, rows))
        result += _stage(stage, rows)
    after = stages[-1].after
    models = [taught, after] if isinstance(recipe, Recipe) else [after] if recipe.answers else []
    requests, timed = 0, ""
    if isinstance(recipe, Recipe) and recipe.report.latency:
        requests, timed = TIMED, "latency, "
    flops = (questions + requests) * sum(_answer_flops(model, rows) for model in models)
    if models:
        passed = sum(_forward_flops(after, rows)) + _answer_flops(after, rows)
        flops += 2 * GATE_PROMPTS * passed
    batches = len(models) * (questions / BATCH + requests) * rows.answer
    work = f"export, {timed}scores on {questions} questions" if models else "export"
    return [*result, Part(REPORT, work, flops, batches, CLOSE + len(models) * questions * rows.decode)]


def _cache(recipe: Recipe | Training, teacher: LMMConfig, rows: Rows) -> list[Part]:
    if not isinstance(recipe, Recipe) or recipe.teacher.mode != "cache":
        return []
    losses = [stage.loss for stage in recipe.stages]
    if not any(loss.reads_teacher for loss in losses):
        return []
    image, text = _forward_flops(teacher, rows)
    whole = any(loss.reads_logits or loss.hidden for loss in losses)
    flops = rows.trained * (image + text * whole)
    return [Part(TARGETS, f"{rows.trained} records", flops, rows.trained / BATCH, COMPILE + rows.trained * rows.decode)]


def _weighing(recipe: Recipe, stage: StageFlops, teacher: LMMConfig, rows: Rows) -> Part:
    """Gradients of the teacher's answers with respect to image tokens."""
    records = recipe.calibration_batches * stage.work.stage.optimizer.batch_size
    image, text = _forward_flops(teacher, rows)
    # Back through the language model, whose parameters get no gradients.
    flops, batches, spent = records * (image + 2 * text), records / BATCH, COMPILE + records * rows.decode
    return Part(f"image tokens for {stage.work.title}", f"sensitivity on {records} records", flops, batches, spent)


def _stage(stage: StageFlops, rows: Rows) -> list[Part]:
    work, table = stage.work, stage.work.stage
    before, after = sizes(stage.before), sizes(stage.after)
    cuts = ", ".join(f"{axis} {before[axis]} to {after[axis]}" for axis in table.sizes)
    steps = f"{table.steps} steps of {table.optimizer.batch_size}"
    flops = stage.steps + table.steps * update_flops(stage.after, work)
    ahead = table.steps * table.optimizer.batch_size * rows.decode * stage.pictures
    result = [Part(work.title, f"{cuts}; {steps}" if cuts else steps, flops, table.steps, 2 * COMPILE, ahead)]
    if stage.features:
        flops, batches, spent = stage.features, rows.trained / BATCH, COMPILE + rows.trained * rows.decode
        result.insert(0, Part("image features", f"{rows.trained} records", flops, batches, spent))
    if stage.importance:
        result.insert(0, Part(f"importance for {work.title}", cuts, stage.importance))
    if work.scored:
        flops, batches = rows.scored * _answer_flops(stage.after, rows), rows.scored / BATCH * rows.answer
        spent = COMPILE + rows.scored * rows.decode
        result.append(Part(f"{SCORES}{work.title}", f"{rows.scored} questions", flops, batches, spent))
    return result


def _forward_flops(config: LMMConfig, rows: Rows) -> tuple[float, float]:
    """FLOPs of a forward pass over one record: of the image side, and of the language model."""
    flops = pass_flops(config, 1, **_lengths(rows))
    image = sum(flops[part] for part in IMAGE_SIDE)
    return image, sum(flops.values()) - image


def _answer_flops(config: LMMConfig, rows: Rows) -> float:
    """FLOPs of generating one answer."""
    phases = pruning.cost(config, 1, rows.prompt, rows.answer, slots=rows.slots).flops
    return sum(sum(towers.values()) for towers in phases.values())


def _lengths(rows: Rows) -> dict[str, Any]:
    """Arguments of `stage_flops`."""
    return {"length": rows.prompt, "answer": rows.answer, "slots": rows.slots}


def matmul_rate(dtype: str = "float32", devices: int = 0) -> float:
    """Measures the FLOP/s of a matrix product, the best of several, and returns those of all devices of the mesh.

    Simulated devices of a CPU share its cores.

    Args:
        dtype: dtype of the matrices.
        devices: number of devices; 0 for those of the mesh that is set.
    """
    cpu = jax.default_backend() == "cpu"
    side, devices = (_SIDE, jax.process_count()) if cpu else (_LARGE, devices or sharding.devices())
    square, product, taken = np.ones((side, side), np.float32), jax.jit(jnp.dot), []
    with sharding.without_mesh():
        placed = jnp.asarray(square, dtype)
        for _ in range(6):
            begin = time.perf_counter()
            product(placed, placed).block_until_ready()
            taken.append(time.perf_counter() - begin)
    return devices * 2 * side**3 / min(taken)


def seconds(part: Part, rate: float) -> float:
    """Estimates the duration of a part.

    Args:
        part: the part.
        rate: from `matmul_rate`.

    Returns:
        Seconds.
    """
    return part.seconds + max(CALL * part.batches + part.flops / (SHARE * rate), part.ahead)


def announce(
    recipe: Recipe | Training,
    start: LMMConfig,
    rows: Rows,
    done: Collection[str] = (),
    *,
    teacher: LMMConfig | None = None,
    devices: int = 0,
) -> dict[str, float]:
    """Prints the parts of a run with estimated durations.

    Args:
        recipe: the recipe.
        start: config of the initial model.
        rows: statistics of the data.
        done: titles of complete stages, and of other parts that the run leaves out.
        teacher: config of the teacher, if it is not the initial model.
        devices: as in `matmul_rate`.

    Returns:
        Title of each part -> estimated seconds.
    """
    [*_, last] = stage_flops(start, recipe, **_lengths(rows))
    before, after = total_parameters(start), total_parameters(last.after)
    smaller = f" to about {count(after)}, {before / after:.3g} times fewer" if after < before else ""
    say(f"{count(before)} parameters{smaller}; the parts of the run, with estimated durations:")
    todo = [part for part in parts(recipe, start, rows, teacher) if not part.title.endswith((*done,))]
    rate = matmul_rate(recipe.work[0].stage.optimizer.dtype, devices)
    times = [seconds(part, rate) for part in todo]
    for part, each in zip(todo, times, strict=True):
        say(f"  {clock(each):>7}  {part.title}: {part.work}")
    say(f"  {clock(sum(times)):>7}  in total, estimated from {count(rate)}FLOP/s of a matrix product on this machine")
    return {part.title: each for part, each in zip(todo, times, strict=True)}
