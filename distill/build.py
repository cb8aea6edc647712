"""Building of a teacher cache: the teacher runs once over all samples, and each process writes its own rows."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.books import write_book
from antgmm_jax.io.shards import Shards, Writer
from antgmm_jax.parallel import processes, sharding
from antgmm_jax.parallel.preemption import Preempted
from distill import top
from distill.cache import Params, read_meta
from distill.chunked import at_positions
from distill.records import FORMAT, Ragged, at_answers, dtype_of, has_image_slots, lengths, record, total_bytes
from distill.teacher import model_inputs

FILES = 256
"""Most files of a cache, about: each ends at a point from which an interrupted build can resume."""


def cache_size(
    functional: Any,
    params: Params,
    like: Mapping[str, Any],
    *,
    samples: int,
    totals: Mapping[Ragged, int],
    names: tuple[str, ...],
) -> dict[str, int]:
    """Returns the size of a cache on disk, without running the teacher.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher.
        like: a host batch of the largest shape.
        samples: number of samples.
        totals: answer tokens, tokens of text and image slots of all samples.
        names: cached states: `final` (or a name of `distill.top`), `<tower>/states`, `bridge/out`.

    Returns:
        name -> bytes.
    """
    return total_bytes(_row_shapes(functional, params, like, names), totals, samples)


def build_cache(
    functional: Any,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    directory: Path,
    *,
    samples: int,
    like: Mapping[str, Any],
    key: str,
    names: tuple[str, ...] = ("final",),
    size: int = 0,
    progress: Callable[[int, int], None] = lambda done, samples: None,
) -> None:
    """Runs the teacher once over all samples and stores its states; an interrupted build resumes.

    Builds nothing if a complete cache with the same key and all names exists. The cache is written to
    `<directory>.partial` and renamed when complete. All processes of a run iterate over the same batches; each
    supplies and stores only its own rows, so states are never gathered. A build may resume with another number of
    processes.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher, in the dtype to compute in.
        batches: host batches with `index` [B]; together they must contain every row 0 .. samples - 1. Rows may repeat.
        directory: folder to create; all processes must see it.
        samples: number of samples.
        like: a host batch of the largest lengths.
        key: key of the cache, from `fingerprint`.
        names: states to store: `final` (or a name of `distill.top`) for losses that compare logits, and
            `<tower>/states` and `bridge/out` for losses that compare them. The teacher runs only the parts that these
            states need.
        size: bytes that must be free on the disk for a whole cache, from `cache_size`; 0 for no check.
        progress: called with (samples done, samples).

    Raises:
        AntgmmError: rows are missing from the batches, padding is on the left, or the disk is too full.
        Preempted: `progress` raised it; the rows up to here are stored.
    """
    # In a fixed order, so that another caller can resume the build.
    names = tuple(sorted({*names}, key=lambda name: (not at_answers(name), name)))
    shapes = _row_shapes(functional, params, like, names)
    meta = {"format": FORMAT, "key": key, "samples": samples, "shapes": {n: list(shape) for n, shape in shapes.items()}}

    def is_complete() -> bool:
        whole = read_meta(directory)
        return bool(whole) and {**whole, "shapes": {name: whole["shapes"].get(name) for name in shapes}} == meta

    if processes.from_first_process(is_complete):
        progress(samples, samples)
        return
    partial = directory.with_name(directory.name + ".partial")
    stored = processes.run_on_first(lambda: _begin(partial, meta, size))
    done = processes.broadcast_from_first(np.zeros(samples, bool) if stored is None else stored)

    @jax.jit
    def run(params: Params, batch: dict) -> tuple[dict[str, jax.Array], jax.Array]:
        states = targets(functional, params, batch, names)
        counts = jnp.stack(lengths(batch, names, ignored=IGNORE), axis=1)
        return {name: sharding.place(rows, ("batch",)) for name, rows in states.items()}, sharding.place(
            counts, ("batch",)
        )

    writer = Writer(partial, jax.process_index())
    for count, batch in enumerate(batches, 1):
        index = processes.gather(sharding.shard_rows({"index": batch["index"]}))["index"]
        new = np.zeros(len(index), bool)
        new[np.unique(index, return_index=True)[1]] = True  # once per row, even if it repeats in the batch
        new &= ~done[index]
        if new.any():
            if not all(map(at_answers, names)):
                _check_padding(batch)
            states, counts = run(params, sharding.shard_rows(_device(batch)))
            for place, content in _records(states, counts, names):
                if new[place]:
                    writer.add(int(index[place]), content)
            done[index] = True
        if count % math.ceil(samples / len(index) * jax.process_count() / FILES) == 0:
            writer.flush()
        try:
            progress(int(done.sum()), samples)
        except Preempted:
            writer.flush()
            raise
    writer.flush()
    processes.barrier(f"{partial} written")
    processes.run_on_first(lambda: _finish(partial, directory, samples))


def _records(states: Mapping[str, jax.Array], counts: jax.Array, names: tuple[str, ...]) -> Iterator[tuple[int, bytes]]:
    """Iterates over the rows of a batch that this process writes, as (position in the whole batch, bytes).

    If several devices hold the same rows, only the first replica counts, so that exactly one process writes each row.
    """
    arrays = (*(states[name] for name in names), counts)
    for *parts, used in zip(*([x for x in a.addressable_shards if x.replica_id == 0] for a in arrays), strict=True):
        rows = {name: np.asarray(part.data) for name, part in zip(names, parts, strict=True)}
        first = used.index[0].start or 0
        for row, each in enumerate(np.asarray(used.data)):
            yield first + row, record({name: x[row] for name, x in rows.items()}, each)


def targets(functional: Any, params: Params, batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Returns the states that a cache stores for a batch.

    Args:
        functional: `Functional` of the teacher.
        params: its parameters.
        batch: the batch.
        names: states, as in `build_cache`.

    Returns:
        name -> states [B, ..., positions, width]; [B, slots, ...] for image towers.
    """
    answers = [name for name in names if at_answers(name)]
    towers = tuple(name for name in names if name not in answers)
    out = functional.apply(params, model_inputs(batch), collect=(*(["final"] if answers else []), *towers))
    rows = {name: jnp.swapaxes(out[name], 0, 1) for name in towers}
    # States of images have the slots of all rows on one axis: separate rows and slots.
    rows |= {
        name: x.reshape(len(batch["input_ids"]), -1, *x.shape[1:]) for name, x in rows.items() if has_image_slots(name)
    }
    for name in answers:
        final = at_positions(out["final"], batch["positions"])
        rows[name] = top.states(functional.head, params, final, name) if top.is_top(name) else final
    return {name: rows[name].astype(dtype_of(name)) for name in names}


def _device(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("id", "index", "slots")}


def _row_shapes(functional: Any, params: Params, like: Mapping, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    with sharding.without_mesh():  # over which one row is not split
        made = jax.eval_shape(lambda params, batch: targets(functional, params, batch, names), params, _device(like))
    return {name: made[name].shape[1:] for name in names}  # in the order of the records


def _check_padding(batch: Mapping[str, Any]) -> None:
    # Cached rows are cut on the right to the length of a batch; with padding on the left, tokens would be misaligned.
    if "attention_mask" in batch and not np.asarray(batch["attention_mask"])[:, 0].all():
        raise AntgmmError("the teacher cache needs input_ids padded on the right, but a batch is padded on the left")


def _begin(partial: Path, meta: dict, size: int) -> np.ndarray:
    """Starts or resumes a build; returns which rows are stored already, bool [samples]."""
    if read_meta(partial) != meta:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_book(partial / "meta.json", meta)
    for leftover in partial.glob(".*.tmp"):
        leftover.unlink()
    held = Shards(partial, meta["samples"]).held
    needed = size * float(np.mean(~held))
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise AntgmmError(
            f"teacher cache {partial} needs {needed / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free: make room, "
            "or run the teacher online in another run"
        )
    return held


def _finish(partial: Path, directory: Path, samples: int) -> None:
    held = Shards(partial, samples).held
    if not held.all():
        raise AntgmmError(
            f"teacher cache {directory}: {int((~held).sum())} of {samples} samples are missing from the batches"
        )
    if directory.exists():
        folders.discard(directory)
    folders.publish(partial, directory)
