"""A whole run from its recipe, phase by phase, for devices that need not exist."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import distill
from antgmm_jax.config import IMAGE_SIDE, LMMConfig
from antgmm_jax.decoding import crowded
from antgmm_jax.decoding import phases as decoding_phases
from antgmm_jax.families import complete
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.memory import assumed
from antgmm_jax.pure import Functional, abstract, functional
from distill.adapters import shapes_with_adapters
from distill.build import targets
from distill.records import Ragged
from distill.sensitivity import token_shares
from distill.trainable import by_path
from experiments.lab.planning import programs
from experiments.lab.planning import step as steps
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.phase import Load, Phase
from experiments.lab.planning.programs import bytes_of
from experiments.lab.planning.scorers import scorers
from experiments.lab.planning.shapes import batch_shapes, mesh_for, model_shapes
from experiments.lab.planning.step import StepSpec
from experiments.run.batch_size import rows_that_fit
from experiments.run.calibration import importance_pieces, scoring_pieces
from experiments.run.checks import check_batches
from experiments.run.cuts import after, planned, reads_features, segment_targets, weighs_tokens
from experiments.run.features import views
from experiments.run.micro_batches import with_parts
from experiments.run.narrow import held_by, left_by, with_dtypes
from experiments.run.progress.flops import pass_flops
from experiments.run.schema import Recipe, Training, Work
from experiments.run.schema.stage import UNREAD
from experiments.run.stage import optimizer_of
from experiments.run.targets import CACHE_BATCH, IN_MEMORY, names_read, target_names
from experiments.run.unchanged import unchanged
from pruning.costs import cost, total_parameters

SCORED, GATE = 64, 64
"""Questions of a batch for scores and for the export check."""
CHECK, REPORT = "check of the export", "report"
"""Phases that run on one device."""
HOST = 8
"""Devices of a machine, for the host memory that the copies of a checkpoint and the rows of batches take."""
AHEAD = 8
"""Batches that the loader's threads hold at most, one each."""


def phases(recipe: Recipe | Training, config: LMMConfig, load: Load, start: LMMConfig | None = None) -> Iterator[Phase]:
    """Plans the phases of a run; programs are compiled, the rest is arithmetic.

    Args:
        recipe: the recipe.
        config: config of the teacher, or of the model that is trained.
        load: devices and rows.
        start: config of the initial model, if it is not `config`: that of a parent.

    Yields:
        The phases, in order.

    Raises:
        AntgmmError: a batch is not divisible by the mesh, or the sizes of a stage are not legal.
    """
    dtype, teacher = recipe.optimizer.dtype, config if isinstance(recipe, Recipe) else None
    with jax.set_mesh(mesh_for(load.mesh, load.chip)):
        shapes = model_shapes(config, dtype)
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        for work in recipe.work:
            check_batches(work)
        works = [*map(with_parts, recipe.work)]
    yield Phase("loading", {"model": bytes_of(shapes)}, host=largest)
    if isinstance(recipe, Recipe) and recipe.teacher.mode == "cache" and target_names(recipe):
        yield _cache(recipe, config, load)
    config = start or config
    for work in works:
        yield from _stage(recipe, work, config, teacher, load)
        load = load._replace(narrow=left_by(work, config, load.narrow))
        config = after(config, work.stage)
    yield _check(recipe, config, load)
    if isinstance(recipe, Recipe) and teacher is not None and recipe.report.latency:
        yield _report(recipe, teacher, load)


def _rows(
    config: LMMConfig, most: int, dtype: str, load: Load, *, text: int = 0, answer: int = 0, generated: int = 0
) -> int:
    """Rows of a batch of a pass without gradients, as a run chooses them; on the mesh that is set."""
    limits = {
        "text": text,
        "answer": answer,
        "slots": load.slots or config.slots,
        "dtype": dtype,
        "generated": generated,
    }
    return sharding.padded_batch_size(rows_that_fit(config, most, **limits, memory=load.memory))


def _batch(config: LMMConfig, rows: int, load: Load) -> dict[str, Any]:
    return dict(batch_shapes(config, rows, load.length, load.answer, slots=load.slots))


def _flops(config: LMMConfig, rows: int, load: Load) -> dict[str, int]:
    return pass_flops(config, rows, length=load.length, answer=load.answer, slots=load.slots)


def _passes(config: LMMConfig, rows: int, load: Load) -> int:
    """FLOPs of a forward pass on all devices."""
    return sum(_flops(config, rows, load).values())


def _lengths(config: LMMConfig, load: Load) -> dict[str, int]:
    """Columns of text and answers, and image slots, of a row as in training."""
    text = load.length if config.encoder_decoder else load.length + load.answer
    return {"text": text, "answer": load.answer, "slots": load.slots or config.slots}


def _program(run: Any, arguments: tuple[Any, ...], load: Load) -> programs.Program:
    return programs.compiled(jax.jit(run).lower(*arguments), arguments, load.chip, load.devices)


def _cache(recipe: Recipe, config: LMMConfig, load: Load) -> Phase:
    """The teacher's states of all records that the stages read."""
    samples, names = recipe.data.samples + recipe.teacher.pairs, target_names(recipe)
    pure, dtype = functional(config), recipe.optimizer.dtype
    text = _lengths(config, load)["text"]

    def run(params: Any, batch: Any) -> dict[str, jax.Array]:
        return {name: sharding.place(rows, ("batch",)) for name, rows in targets(pure, params, batch, names).items()}

    with jax.set_mesh(mesh_for(load.mesh, load.chip)):
        rows = _rows(config, min(CACHE_BATCH, samples), dtype, load, text=text, answer=load.answer)
        params = model_shapes(config, dtype)
        batch = _batch(config, rows, load)
        program = _program(run, (params, batch), load)
        memory = {"teacher": bytes_of(params), "batch": bytes_of(batch), **_more(program)}
        size = _cached(names, pure, params, batch, samples)
    sent = -(-samples // rows) * sum(program.sent.values())
    flops = _passes(config, samples, load) / load.devices
    return Phase("teacher cache", memory, size if size <= IN_MEMORY else 0, size, sent, flops, compiled=True)


def _cached(names: tuple[str, ...], pure: Functional, params: Any, batch: Mapping[str, Any], samples: int) -> int:
    """Bytes of the cache, as if each row had the full length."""
    slots = batch["images"]["valid"].shape[1]
    totals: dict[Ragged, int] = {
        "answer": samples * batch["targets"].shape[1],
        "text": samples * batch["input_ids"].shape[1],
        "slots": samples * slots,
    }
    return sum(distill.cache_size(pure, params, batch, samples=samples, totals=totals, names=names).values())


def _more(program: programs.Program) -> dict[str, int]:
    return {"temporaries": program.temporaries, "layout": program.layout}


def _stage(
    recipe: Recipe | Training, work: Work, config: LMMConfig, teacher: LMMConfig | None, load: Load
) -> Iterator[Phase]:
    """Features, importance, start, step and scores of a stage."""
    stage = work.stage
    targets = segment_targets(config, stage)
    frozen = work.objective == "answers" and reads_features(config, stage, targets[-1])
    features = frozen and recipe.features == "disk"
    if features:
        yield _features(recipe, work, config, load)
    methods = {axis: stage.method(axis) for axis in complete(config, targets[-1])} if targets[-1] else {}
    if not {*methods.values()} <= UNREAD:
        yield _importance(recipe, work, config, methods, load)
    first = planned(config, stage, targets[0])
    if teacher is not None and weighs_tokens(teacher, stage):
        yield _weighing(recipe, work, teacher, load)
    held = held_by(work, config, load.narrow)
    spec = _spec(recipe, work, config if stage.mask_steps else first, teacher, load)
    spec = spec._replace(features=features, narrow=held)
    step = steps.compiled(spec, load.mesh, load.chip)
    state = step.memory["parameters"] + step.memory["moments"]
    start = {"parameters": step.memory["parameters"], "moments": step.memory["moments"]}
    if teacher is not None and spec.source == "online":
        start["teacher"] = step.memory["teacher"]
    yield Phase(f"{work.title}: start", start, host=_largest(config))
    # Maps are float32 once adapters are added to them.
    left = left_by(work, config, load.narrow)
    adapted = [leaf.size for path, leaf in by_path(abstract(config))[0].items() if path in {*held} - {*left}]
    result = step.memory["parameters"] + 2 * sum(adapted) // (load.mesh["fsdp"] * load.mesh["tensor"])
    shapes = by_path(with_dtypes(abstract(config), held))[0]
    same = unchanged(work, config) if work.objective == "answers" else ()
    absent = sum(shapes[path].size * shapes[path].dtype.itemsize for path in same)
    saved = state - absent // (load.mesh["fsdp"] * load.mesh["tensor"])
    # Two checkpoints are kept while the next one is written; the stage's result has the parameters alone.
    disk = (3 * saved + result) * load.devices
    held, sent = state + AHEAD * step.memory["batch"], stage.steps * sum(step.sent.values())
    flops = stage.steps * step.flops
    yield Phase(
        f"{work.title}: step", step.memory, held * min(load.devices, HOST), disk, sent, flops, spec, compiled=True
    )
    if stage.adapters:
        # Map by map; factors and their product are not split.
        product = 4 * max(adapted, default=0)
        merging = {"parameters": result, "moments": step.memory["moments"], "product": product}
        yield Phase(f"{work.title}: adding the adapters", merging)
    if work.objective == "answers":
        yield _scores(recipe, work, after(config, stage), load)


def _largest(config: LMMConfig) -> int:
    """Bytes of the largest array in float32."""
    return 4 * max(leaf.size for leaf in jax.tree.leaves(abstract(config)))


def _spec(recipe: Recipe | Training, work: Work, student: LMMConfig, teacher: LMMConfig | None, load: Load) -> StepSpec:
    table, reads = work.stage.optimizer, isinstance(recipe, Recipe) and work.stage.loss.reads_teacher
    return StepSpec(
        student,
        teacher if reads else None,
        table.batch_size,
        load.length,
        load.answer,
        table.remat,
        source="online" if isinstance(recipe, Recipe) and recipe.teacher.mode == "online" else "cache",
        dtype=table.dtype,
        micro_batches=table.accumulate,
        loss=work.stage.loss,
        states=names_read(recipe.teacher, [work.stage.loss]) if isinstance(recipe, Recipe) and reads else (),
        optimizer=optimizer_of(work.stage, shapes_with_adapters(abstract(student), work.stage.adapters)),
        adapters=work.stage.adapters,
        slots=load.slots,
    )


def _features(recipe: Recipe | Training, work: Work, config: LMMConfig, load: Load) -> Phase:
    """Image features of all rows and their views, on disk."""
    samples, dtype = recipe.data.samples * views(work.stage.shift), work.stage.optimizer.dtype
    with jax.set_mesh(mesh_for(load.mesh, load.chip)):
        params, rows = model_shapes(config, dtype), _rows(config, min(SCORED, recipe.data.samples), dtype, load)
        images = _batch(config, rows, load)["images"]
        made = jax.eval_shape(functional(config).features, params, images)
        program = _program(functional(config).features, (params, images), load)
        memory = {"model": bytes_of(params), "batch": bytes_of(images), **_more(program)}
    disk = jnp.dtype(dtype).itemsize * samples * math.prod(made.shape[1:])
    sent = -(-samples // made.shape[0]) * sum(program.sent.values())
    return Phase(f"{work.title}: image features", memory, 0, disk, sent, compiled=True)


def _weighing(recipe: Recipe | Training, work: Work, teacher: LMMConfig, load: Load) -> Phase:
    """Sensitivity of the teacher's answers to image tokens."""
    table = work.stage.optimizer
    lengths = _lengths(teacher, load)
    with jax.set_mesh(mesh_for(load.mesh, load.chip)):
        batches = recipe.calibration_batches
        pieces = scoring_pieces(table, teacher, batches, **lengths, memory=load.memory)
        params = model_shapes(teacher, table.dtype)
        batch = _batch(teacher, pieces["batch_size"], load)
        program = _program(
            token_shares(functional(teacher, table.remat), jnp.dtype(table.dtype)), (params, batch), load
        )
        memory = {"teacher": bytes_of(params), "batch": bytes_of(batch), **_more(program)}
    sent, rows = pieces["batches"] * sum(program.sent.values()), pieces["batches"] * pieces["batch_size"]
    passes = _flops(teacher, rows, load)
    image = sum(passes[tower] for tower in IMAGE_SIDE)
    # Gradients pass the language model back to the features, and no parameters.
    flops = (2 * sum(passes.values()) - image) / load.devices
    return Phase(f"{work.title}: image tokens", memory, 0, 0, sent, flops, compiled=True)


def _importance(
    recipe: Recipe | Training, work: Work, config: LMMConfig, methods: Mapping[str, str], load: Load
) -> Phase:
    """Scores of the units before the cut, by one program a method; the largest one counts."""
    table = work.stage.optimizer
    lengths = _lengths(config, load)
    with jax.set_mesh(mesh_for(load.mesh, load.chip)):
        batches = recipe.calibration_batches
        pieces = importance_pieces(table, config, batches, methods, **lengths, memory=load.memory)
        params = model_shapes(config, table.dtype)
        batch = _batch(config, pieces["batch_size"], load)
        made = [_program(run, (params, batch), load) for run in scorers(config, methods, table.dtype, table.remat)]
        largest = max(made, key=lambda program: program.temporaries)
        memory = {"model": bytes_of(params), "batch": bytes_of(batch), **_more(largest)}
    sent = pieces["batches"] * sum(sum(program.sent.values()) for program in made)
    passes = len(made) + 2 * ("taylor" in methods.values())  # gradients take the products of two more
    flops = passes * _passes(config, pieces["batch_size"] * pieces["batches"], load) / load.devices
    return Phase(f"{work.title}: importance", memory, 0, 0, sent, flops, compiled=True)


def _scores(recipe: Recipe | Training, work: Work, config: LMMConfig, load: Load) -> Phase:
    """Answers to the test records: images and prompt in one program, the tokens of the answers in another."""
    records, longest = recipe.evaluate.data.samples, recipe.evaluate.max_new_tokens
    dtype = work.stage.optimizer.dtype
    request = decoding_phases(config, longest, (), 0)

    def run(params: Any, batch: Any) -> Any:
        features = functional(config).features(params, batch["images"])
        return request.prefill(params, {**batch, "vision_features": features})

    # From the memory, decoding chooses whether it copies its layers.
    with jax.set_mesh(mesh_for(load.mesh, load.chip)), assumed(load.memory):
        rows = _rows(config, min(SCORED, records), dtype, load, text=load.length, answer=longest, generated=longest)
        params = model_shapes(config, dtype)
        shapes = _batch(config, rows, load._replace(answer=0))
        batch = {name: shapes[name] for name in ("input_ids", "attention_mask", "images")}
        state = jax.eval_shape(run, params, batch)
        state = jax.tree.map(lambda leaf: sharding.place(leaf, ("batch",)) if leaf.shape else leaf, state)
        # Of the batch, decoding needs what the prompt has left.
        given = {bytes_of(batch): (run, batch), bytes_of(state): (request.decode, state)}
        made = {size: _program(each, (params, rows), load) for size, (each, rows) in given.items()}
        size, largest = max(made.items(), key=lambda one: one[0] + one[1].temporaries)
        memory = {"model": bytes_of(params), "batch": size, **_more(largest)}
    flops = sum(
        sum(each.values()) for each in cost(config, records, load.length, longest, slots=load.slots).flops.values()
    )
    sent = -(-records // rows) * sum(sum(program.sent.values()) for program in made.values())
    return Phase(f"{work.title}: scores", memory, 0, 0, sent, flops / load.devices, compiled=True)


def _check(recipe: Recipe | Training, config: LMMConfig, load: Load) -> Phase:
    """The export check: the student in float32 on one device, and in PyTorch."""
    parameters, longest = total_parameters(config), recipe.evaluate.max_new_tokens
    itemsize = 4 if recipe.export.dtype == "float32" else 2
    files = 0 if itemsize == 4 else itemsize * parameters  # stay beside the parameters in float32
    limits = {
        "text": load.length,
        "answer": longest,
        "slots": load.slots or config.slots,
        "memory": load.memory - files,
    }
    rows = rows_that_fit(config, min(GATE, recipe.evaluate.data.samples), **limits)
    answers = {"keys and values": cost(config, rows, load.length, longest, itemsize=4).kv_cache}
    logits = 4 * rows * load.answer * config.language.vocab
    layers = _copied(4 * _decoder_size(config), load)
    memory = {"student": 4 * parameters + files, "layers": layers, **answers, "temporaries": logits}
    return Phase(CHECK, memory, 4 * parameters, itemsize * parameters)


def _report(recipe: Recipe | Training, teacher: LMMConfig, load: Load) -> Phase:
    """Latency of one request to the largest model, which is whole on one device."""
    itemsize = 4 if recipe.export.dtype == "float32" else 2
    longest = recipe.evaluate.max_new_tokens
    answers = cost(teacher, 1, load.length, longest, itemsize=itemsize).kv_cache
    layers = _copied(itemsize * _decoder_size(teacher), load)
    memory = {"teacher": itemsize * total_parameters(teacher), "layers": layers, "keys and values": answers}
    return Phase(REPORT, memory)


def _decoder_size(config: LMMConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)["language"]["decoder"]))


def _copied(layers: int, load: Load) -> int:
    """Bytes of the copy of the decoder's layers that decoding holds: none on TPUs, nor where it has no room."""
    slices = bool(load.chip) and CHIPS[load.chip].slices
    return 0 if slices or crowded(layers, load.memory) else layers
