"""Peak memory of a whole compression by phase, for a random model of about 290 million parameters."""

import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from antgmm_jax.families import new_processor
from antgmm_jax.io.convert import open_hf, save_hf
from antgmm_jax.parallel import sharding
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from data.tokenizer import corpus, train_tokenizer
from distill.teacher import to_dtype
from experiments.report.write import finish
from experiments.run.host.console import count, table
from experiments.run.host.resources import memory
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from pruning.costs import total_parameters

PRESET = "llava-290m"

EVERY = 0.02
"""Seconds between readings."""

PHASES = {
    "convert.load_hf": "load",
    "student.load": "load",
    "pairs.with_pairs": "pairs",
    "build.build_cache": "teacher cache",
    "features.image_features": "image features",
    "calibration.importance": "importance",
    "stage._cut": "cut",
    "stage._train": "train",
    "scoring.scored": "scores",
    "checkpoint.save_stage": "save",
    "export_gate.check": "gate",
    "publishing.publish": "export",
    "write.write_report": "report",
}
"""File and function -> phase; the innermost one on the stack of the main thread counts."""

RECIPE = """
calibration_batches = 1
[teacher]
path = "{teacher}"
mode = "{mode}"
pairs = 2
[data]
kind = "maad"
tier = "s"
samples = 4
[loss]
soft = 1.0
[optimizer]
learning_rate = 1e-4
batch_size = 2
remat = "full"
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 2
[report]
latency = false
[[stage]]
name = "layers"
recover_steps = 2
importance = {{ "text/layers" = "block_influence", "*" = "taylor" }}
sizes = {{ "vision/layers" = 8, "text/layers" = 7 }}
[[stage]]
name = "widths"
mask_steps = 1
recover_steps = 2
sizes = {{ "vision/mlp" = 1536, "text/mlp" = 1408 }}
[[stage]]
name = "language"
frozen = ["vision", "bridge"]
recover_steps = 2
"""


class PeakByPhase:
    """Measures the peak of anonymous memory in each phase of a `with` block, relative to its start.

    Pages of files that libraries map do not count: Linux drops them when it needs memory, during a phase or not.
    """

    def __enter__(self) -> Self:
        self._before = memory("RssAnon") or 0
        self.peaks: dict[str, int] = {}
        self._done, self._watched = threading.Event(), threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            phase, now = self._phase(), (memory("RssAnon") or 0) - self._before
            self.peaks[phase] = max(now, self.peaks.get(phase, 0))

    def _phase(self) -> str:
        frame = sys._current_frames().get(self._watched)
        while frame is not None:
            if phase := PHASES.get(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"):
                return phase
            frame = frame.f_back
        return "other"

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def save_teacher(directory: Path) -> Path:
    """Saves a random checkpoint in bfloat16 with a processor, unless it exists.

    Args:
        directory: folder to create.

    Returns:
        The folder.
    """
    if directory.exists():
        return directory
    config = preset(PRESET)
    processor = new_processor(config, train_tokenizer(corpus("s", 200), vocab=256, min_frequency=2))
    like = directory.with_name("processor")
    processor.save_pretrained(like)
    init = jax.jit(lambda key: to_dtype(functional(config).init(key), jnp.bfloat16))
    (like / "config.json").write_text("{}")  # `save_hf` copies the other fields from it
    save_hf(config, init(jax.random.key(0)), directory, like=like)
    return directory


def measure(folder: Path, mode: str) -> dict[str, Any]:
    """Runs a whole compression, cut included, and measures the peak memory of each phase.

    Args:
        folder: folder of teacher, recipes and runs; an interrupted run continues.
        mode: "cache" or "online" teacher.

    Returns:
        Figures as JSON types: `parameters` of the teacher, `devices`, `seconds`, and `bytes_a_parameter` by phase,
        beyond the memory of the process before the run.
    """
    teacher, split = save_teacher(folder / "teacher"), jax.sharding.get_abstract_mesh().shape
    run = folder / "-".join([mode, *(f"{axis}{size}" for axis, size in split.items() if size > 1)])
    recipe = run.with_suffix(".toml")
    rows = max(2, sharding.padded_batch_size(1))
    changes = [f"optimizer.batch_size={rows}", f"data.samples={rows + 2}"]
    recipe.write_text(RECIPE.format(teacher=teacher, mode=mode))
    parameters, begin = total_parameters(open_hf(teacher)[0]), time.monotonic()
    with PeakByPhase() as watched:
        finish(Run(load_recipe(recipe, changes), run))
    peaks = {phase: round(peak / parameters, 2) for phase, peak in watched.peaks.items()}
    return {
        "parameters": parameters,
        "devices": math.prod(split.values()),
        "seconds": round(time.monotonic() - begin),
        "bytes_a_parameter": peaks,
    }


def shown(figures: Mapping[str, Any]) -> Any:
    """Formats the figures as a table, the largest phase first.

    Args:
        figures: from `measure`.

    Returns:
        A table.
    """
    peaks = sorted(figures["bytes_a_parameter"].items(), key=lambda item: -item[1])
    title = f"Peak memory of a run with a teacher of {count(figures['parameters'])} parameters"
    return table(["phase", "bytes a parameter"], [(phase, f"{peak:.1f}") for phase, peak in peaks], title)
