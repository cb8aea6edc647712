"""Where the time of loading goes: milliseconds per picture by part, and pictures per second by threads."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data.batching import batches
from data.collate import pictures
from data.record import Arrays
from experiments.run.rows.samples import Samples

ROWS, BATCH, BATCHES, THREADS = 64, 16, 12, (1, 2, 4)
PARTS = {
    "row": "reading and parsing the row",
    "decode": "decoding the picture",
    "resize": "resizing it to uint8 pixels",
    "tokens": "token ids",
    "stored": "reading encoded pixels and ids instead",
}
"""Part -> description."""


def parts(samples: Samples) -> dict[str, float]:
    """Measures the parts of loading a row in one thread.

    Args:
        samples: encoded records.

    Returns:
        Part of `PARTS` -> median milliseconds per row; `stored` only if encoded images are kept.
    """
    source, encoder, rows = samples.rows.source, samples.encoder, samples.rows
    index = np.linspace(0, len(samples) - 1, min(ROWS, len(samples))).astype(int).tolist()
    records = [source[row] for row in index]
    row = _median(source.words, index)
    resize = _median(encoder.images, records)
    result = {
        "row": row,
        "decode": max(0.0, _median(source.__getitem__, index) - row),
        "resize": resize,
        "tokens": max(0.0, _median(encoder, records) - resize),
    }
    return {**result, "stored": _median(rows.__getitem__, index)} if rows.kept else result


def _median(function: Callable[[Any], Any], values: list[Any]) -> float:
    def one(value: Any) -> float:
        begin = time.perf_counter()
        function(value)
        return 1e3 * (time.perf_counter() - begin)

    one(values[0])
    return float(np.median([one(value) for value in values]))


def rates(samples: Samples) -> dict[str, dict[int, float]]:
    """Measures batches of pictures as training loads them.

    Args:
        samples: encoded records.

    Returns:
        `files` (pictures are decoded from their files) and, if encoded images are kept, `stored` -> threads -> pictures
        per second.
    """
    rows = samples.rows
    sources: dict[str, Callable[[int], Arrays]] = {"files": lambda row: rows.encoder.images(rows.source[row])}
    if rows.kept:
        sources["stored"] = rows.images
    return {name: {threads: _rate(samples, read, threads) for threads in THREADS} for name, read in sources.items()}


def _rate(samples: Samples, read: Callable[[int], Arrays], threads: int) -> float:
    slots = int(samples.needs.slots.max())

    def make(index: np.ndarray, rng: np.random.Generator) -> Arrays:
        return {"images": pictures([[read(int(row))] for row in index], slots), "index": index}

    data = batches(make, np.zeros(len(samples), int), size=BATCH, seed=0, prefetch=threads, threads=threads)
    for _ in range(threads + 1):  # those that are created ahead
        next(data)
    begin = time.perf_counter()
    count = sum(int(samples.needs.slots[next(data)["index"]].sum()) for _ in range(BATCHES))
    return count / (time.perf_counter() - begin)


def lines(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Formats the results of `parts` and `rates` as rows of a table."""
    each = [(PARTS[name], f"{value:.2f} ms") for name, value in figures["parts"].items()]
    kinds = {"files": "from files", "stored": "encoded"}
    return each + [
        (f"pictures {kinds[name]}, {threads} threads", f"{rate:.0f} a second")
        for name, by_threads in figures["rates"].items()
        for threads, rate in by_threads.items()
    ]
