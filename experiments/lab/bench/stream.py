"""Benchmark of memory, start-up time and loading for different numbers of rows; every size runs in its own process."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from antgmm_jax.config import LMMConfig
from antgmm_jax.families import new_processor
from antgmm_jax.families.common.words import IMAGE
from antgmm_jax.presets import preset
from data.tokenizer import train_tokenizer
from experiments.lab.bench.loading import lines as loading_lines
from experiments.lab.bench.loading import parts, rates
from experiments.run.host.console import say, table
from experiments.run.host.facts import machine

PICTURES, BATCH, BATCHES = 64, 64, 50
_WORDS = ("red", "green", "small", "large", "open", "closed", "left", "right")


def write_rows(folder: Path, rows: int, *, side: int) -> Path:
    """Writes a JSONL file with rows that share `PICTURES` JPEG files.

    Args:
        folder: target folder.
        rows: number of rows.
        side: shorter side of an image in pixels; images are resized on reading.

    Returns:
        The file.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        low = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        low.resize((side * 4 // 3, side)).save(folder / "images" / f"{number}.jpg")
    file = folder / f"{rows}.jsonl"
    with file.open("w") as lines:
        for row in range(rows):
            words = [_WORDS[row // 8**place % 8] for place in range(6)]
            texts = {"question": f"is it {' '.join(words)}?", "answer": words[0]}
            lines.write(json.dumps({"image": f"images/{row % PICTURES}.jpg", **texts}) + "\n")
    return file


def save_model(folder: Path, *, side: int) -> None:
    """Saves the processor of a small model with the given image side."""
    new_processor(_config(side), train_tokenizer(_WORDS * 3, vocab=512, min_frequency=2)).save_pretrained(folder)


def _config(side: int) -> LMMConfig:
    base = preset("llava-tiny")
    return replace(
        base,
        vision=replace(base.vision, image=side, patch=side // 2),
        language=replace(base.language, vocab=512),
        image_token=IMAGE,
    )


def child(file: str, processor: str, side: int) -> dict[str, Any]:
    """Opens the data like a run and creates batches, in this process.

    Args:
        file: from `write_rows`.
        processor: from `save_model`.
        side: image side of the model.

    Returns:
        `peak` bytes of memory, `first` seconds to the first batch, `seconds` in total, whether images are `kept`
        encoded, and `loading` with the results of `parts` and `rates`.
    """
    from antgmm_jax.io.loading import load_processor
    from data.readers import read_records
    from experiments.run.rows.samples import Samples

    loaded = load_processor(processor)
    begin = time.perf_counter()
    samples = Samples(read_records("jsonl", file), loaded, _config(side))
    data = samples.shuffled(BATCH, 0)
    next(data)
    first = time.perf_counter() - begin
    for _ in islice(data, BATCHES - 1):
        pass
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - begin
    loading = {"parts": parts(samples), "rates": rates(samples)}
    return {"peak": peak, "first": first, "seconds": seconds, "kept": samples.rows.kept, "loading": loading}


def run(sizes: Sequence[int], *, side: int) -> dict[str, Any]:
    """Measures each size twice: without and with a cache of encoded data.

    Args:
        sizes: numbers of rows, at least `BATCH`.
        side: image side of the model.

    Returns:
        Figures as JSON types: `rows` -> size -> `new` and `again`, from `child`; `machine`.
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "processor", side=side)
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        for rows in sizes:
            file = write_rows(Path(folder) / "data", rows, side=side * 3 // 2)
            results[str(rows)] = {}
            for turn in ("new", "again"):
                say(f"{rows} rows, {turn}")
                command = [sys.executable, "-m", __name__, str(file), str(Path(folder) / "processor"), str(side)]
                output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
                results[str(rows)][turn] = json.loads(output)
    return {"rows": results, "side": side, "machine": machine()}


def shown(figures: Mapping[str, Any]) -> list[Any]:
    """Formats the figures as a table."""
    lines = []
    for rows, turns in figures["rows"].items():
        for turn, one in turns.items():
            kept = "encoded" if one["kept"] else "in their files"
            peak, first, seconds = f"{one['peak'] / 2**20:.0f} MiB", f"{one['first']:.1f} s", f"{one['seconds']:.1f} s"
            lines.append((rows, turn, peak, first, seconds, kept))
    head = ["rows", "start", "peak memory", "first batch", f"{BATCHES} batches", "images"]
    rows, turns = list(figures["rows"].items())[-1]
    return [
        table(head, lines, f"JSONL with JPEG, batches of {BATCH}, images of {figures['side']} pixels"),
        table(["loading", "one row"], loading_lines(turns["again"]["loading"]), f"{rows} rows"),
    ]


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
