"""Importance scores of all axes for pruning, from calibration batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, Tower, towers
from antgmm_jax.io.loading import load_processor
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.sharding import padded_batch_size, shard_rows
from antgmm_jax.pure import Params, functional, local_axes
from data.record import PROMPT
from data.source import Source
from distill import LossConfig, StepConfig, make_loss
from distill.teacher import model_inputs, to_dtype
from experiments.run.batch_size import compute_dtype, rows_that_fit, saved_bytes
from experiments.run.rows.samples import Samples
from experiments.run.schema.stage import IMPORTANCE, UNREAD
from pruning.importance import Scores

_ROWS = 16
"""Most rows of a batch that units are scored on."""


class Scored(NamedTuple):
    """What each importance method that reads data scores.

    Attributes:
        gates: axis -> gates, for Taylor scores. Only gates that are needed: pruning the language model then needs no
            gradient of the image side.
        units: axes of activation norms.
        towers: stacks of block influences.
        widths: width axes of principal components.
    """

    gates: dict[str, np.ndarray]
    units: tuple[str, ...]
    towers: tuple[Tower, ...]
    widths: tuple[str, ...]


def scored_by(config: LMMConfig, methods: Mapping[str, str]) -> Scored:
    """Returns what each method scores.

    Args:
        config: model config.
        methods: axis -> importance method.

    Returns:
        The axes and towers.
    """
    return Scored(
        {axis: gate for axis, gate in pruning.ones(config).items() if methods.get(axis) == "taylor"},
        tuple(sorted(axis for axis in methods if not axis.endswith("/layers"))),
        tuple(tower for tower in towers(config).values() if tower.axis("layers") in methods),
        tuple(axis for axis, method in methods.items() if method == "principal"),
    )


def importance(
    config: LMMConfig,
    params: Params,
    methods: Mapping[str, str],
    targets: Mapping[str, int],
    samples: Samples,
    *,
    batch_size: int,
    batches: int,
    seed: int,
    dtype: str = "float32",
    remat: str = "dots",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes importance scores on some records, with a method per axis.

    Args:
        config: model config.
        params: model parameters.
        methods: axis -> taylor, magnitude, activation, block_influence, random, last or principal.
        targets: axis -> target size.
        samples: calibration records.
        batch_size: rows per calibration batch.
        batches: number of calibration batches.
        seed: seed of the batches and of random scores.
        dtype: dtype of computation with `params`, which are cast to it.
        remat: what Taylor scores store for the backward pass, as in the train step.

    Returns:
        axis -> float32 scores (missing if the method does not support the axis), and axis -> basis of axes that are
        pruned to principal components (their scores are equal for all channels).

    Raises:
        Preempted: SIGTERM was received.
    """
    calibration = _SafePoints()
    if {*methods.values()} - UNREAD:
        calibration = _SafePoints(calibration_batches(samples, batch_size=batch_size, batches=batches, seed=seed))
    return importance_on(calibration, config, params, methods, targets, seed=seed, dtype=dtype, remat=remat)


def importance_on(
    calibration: Iterable[Mapping[str, jax.Array]],
    config: LMMConfig,
    params: Params,
    methods: Mapping[str, str],
    targets: Mapping[str, int],
    *,
    seed: int,
    dtype: str = "float32",
    remat: str = "dots",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes importance scores on batches, with a method per axis.

    Args:
        calibration: batches on the devices; each method iterates over them once.
        config: model config.
        params: model parameters.
        methods: as in `importance`.
        targets: axis -> target size.
        seed: seed of random scores.
        dtype: as in `importance`.
        remat: as in `importance`.

    Returns:
        As `importance`.
    """
    pure, local, used = functional(config, remat), local_axes(config), set(methods.values())
    scored = scored_by(config, methods)

    def apply(params: Params, batch: Mapping[str, jax.Array], *, collect: tuple[str, ...]) -> dict[str, jax.Array]:
        return pure.apply(to_dtype(params, dtype), model_inputs(batch), collect=collect)

    scores: dict[str, dict[str, np.ndarray]] = {}
    if "taylor" in used:
        loss = make_loss(pure, LossConfig(hard=1.0), dtype=dtype)
        scores["taylor"] = pruning.taylor(lambda p, g, b: loss(p, g, b, {})[0], params, scored.gates, calibration)
    if "magnitude" in used:
        scores["magnitude"] = pruning.magnitude(params, config)
    if "activation" in used:
        scores["activation"] = pruning.activation(apply, params, calibration, scored.units, local)
    if "block_influence" in used:
        scores["block_influence"] = pruning.block_influence(apply, params, calibration, scored.towers)
    if "random" in used:
        scores["random"] = pruning.random(jax.random.key(seed), sizes(config), local)
    if "last" in used:
        scores["last"] = pruning.last(sizes(config))
    bases: dict[str, np.ndarray] = {}
    if "principal" in used:
        present = sizes(config)
        widths = {axis: targets[axis] for axis in scored.widths if targets[axis] < present[axis]}
        bases = pruning.principal(apply, params, config, calibration, widths)
        scores["principal"] = {axis: np.ones(len(basis), np.float32) for axis, basis in bases.items()}
    by_axis = {axis: scores[method][axis] for axis, method in methods.items() if axis in scores[method]}
    return by_axis, bases


def scores_on(
    records: Source, directory: str | Path, config: LMMConfig, params: Params, *, prompt: str = PROMPT
) -> Scores:
    """Scores all units of a model on records: layers by block influence, other units by activation.

    Args:
        records: the records. Enough shuffled batches for all of them are drawn; if the batch size does not divide their
            number, some may be read twice and others not at all.
        directory: Hugging Face directory of the model, with its processor.
        config: model config.
        params: model parameters; `Stored` ones are loaded.
        prompt: prompt template.

    Returns:
        axis -> float32 scores, [n] for a shared axis or [L, n] for a local one.

    Raises:
        AntgmmError: there is no processor, or the model cannot read a record.
    """
    samples = Samples(records, load_processor(directory), config, prompt=prompt)
    dtype = compute_dtype(str(jax.tree.leaves(params)[0].dtype))
    rows = rows_that_fit(config, min(_ROWS, len(samples)), **samples.lengths, dtype=dtype)
    batches, axes = -(-len(samples) // rows), sizes(config)
    methods = {axis: next(how for pattern, how in IMPORTANCE.items() if fnmatchcase(axis, pattern)) for axis in axes}
    loaded = on_devices(config, params, dtype)
    return importance(config, loaded, methods, axes, samples, batch_size=rows, batches=batches, seed=0, dtype=dtype)[0]


class _SafePoints(list[dict[str, jax.Array]]):
    """Batches; a loop over them has a safe point before each."""

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return preemption.leaving(super().__iter__())


def scoring_pieces(
    table: StepConfig, config: LMMConfig, batches: int, *, text: int, answer: int, slots: int, memory: float = 0
) -> dict[str, int]:
    """Returns the batches of rows on which a model is scored before a stage: those of its steps, in parts that fit.

    The model is larger than the student for which the stage's micro-batches are.

    Args:
        table: optimizer table of the stage.
        config: config of the model.
        batches: batches of the stage that are read.
        text: as in `rows_that_fit`.
        answer: as in `rows_that_fit`.
        slots: as in `rows_that_fit`.
        memory: as in `rows_that_fit`.

    Returns:
        `batch_size` and `batches`.
    """
    lengths = {"text": text, "answer": answer, "slots": slots}
    # What a gradient keeps; states of all layers are no more.
    states = saved_bytes(config, **lengths, itemsize=jnp.dtype(table.dtype).itemsize, remat=table.remat)
    most = table.pieces(batches)["batch_size"]
    fitting = rows_that_fit(config, most, **lengths, dtype=table.dtype, states=states, memory=memory)
    # Parts of a micro-batch which the devices share evenly, so that the same rows are read.
    parts = [rows for rows in range(1, most + 1) if most % rows == 0 and padded_batch_size(rows) == rows]
    rows = max((rows for rows in parts if rows <= fitting), default=min(parts, default=most))
    return {"batch_size": rows, "batches": table.batch_size * batches // rows}


def importance_pieces(
    table: StepConfig, config: LMMConfig, batches: int, methods: Mapping[str, str], **lengths: Any
) -> dict[str, int]:
    """Returns the batches for importance: micro-batches for Taylor scores, which are means over them, else as above.

    Args:
        table: as in `scoring_pieces`.
        config: as in `scoring_pieces`.
        batches: as in `scoring_pieces`.
        methods: axis -> importance method.
        lengths: `text`, `answer`, `slots` and `memory` of `scoring_pieces`.
    """
    if "taylor" in methods.values():
        return table.pieces(batches)
    return scoring_pieces(table, config, batches, **lengths)


def calibration_batches(samples: Samples, *, batch_size: int, batches: int, seed: int) -> list[dict[str, jax.Array]]:
    """Returns batches on the devices with one sample per row, for measurements before training.

    Rows of a batch need similar numbers of image slots, or none; batches of all such groups are drawn.

    Args:
        samples: the records.
        batch_size: rows per batch.
        batches: number of batches.
        seed: seed of their order.

    Returns:
        The batches, without `index`.
    """
    size, pictured, chosen = min(batch_size, len(samples)), samples.needs.slots > 0, []
    parts = [part for rows in samples.needs.alike() for part in (rows[pictured[rows]], rows[~pictured[rows]])]
    # First the most rows with images: what ends early reads some, and no few large images alone.
    groups = sorted((rows for rows in parts if rows.size), key=lambda rows: (not pictured[rows[0]], -rows.size))
    images = sum(bool(pictured[rows[0]]) for rows in groups)
    counts = apportioned([len(rows) for rows in groups], batches, images)
    for rows, count in zip(groups, counts, strict=True):
        # A group of fewer rows than a batch is read more than once.
        source = samples.shuffled(size, seed + 500, full=True, rows=np.resize(rows, max(size, len(rows))))
        chosen += [next(source) for _ in range(count)]
    return [shard_rows({name: value for name, value in batch.items() if name != "index"}) for batch in chosen]


def apportioned(rows: Sequence[int], batches: int, images: int) -> list[int]:
    """Returns the number of batches from each group of rows, in proportion to the rows.

    Args:
        rows: number of rows of each group.
        batches: number of batches, at least 1.
        images: number of groups with images, which are the first ones. One of them gets a batch also if they are small:
            without any image, measurements of the image side would be zeros.
    """
    exact = batches * np.array(rows) / sum(rows)
    counts = exact.astype(int)
    for group in np.argsort(counts - exact, kind="stable")[: batches - counts.sum()]:
        counts[group] += 1
    if images and not counts[:images].any():
        counts[counts.argmax()] -= 1
        counts[0] = 1
    return counts.tolist()
