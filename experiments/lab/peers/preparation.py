"""Creates the folder of the task: text, checkpoints as text models and for this toolkit, and order of batches."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.convert import save_hf
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from data.batching import Batches, batches
from data.record import Arrays
from experiments.lab.peers.task import BUCKETED, Task, Text, draw, padded, read, write

# tunix's Llama always uses this base.
ROPE_THETA = 1e6
BASE = "llava-tiny"
"""Preset with a text model that all contenders support."""
OURS, THEIRS = "ours", "text"
"""Folders with the checkpoints `student` and `teacher`: for this toolkit, and as text models."""
_VISION = 8  # image side and width of the unused image encoder
_IMAGE_TOKEN = 3
_WEIGHTS = "model.safetensors"
_PREFIX = "language_model."


def prepare(task: Task, folder: Path) -> None:
    """Creates the folder of a task if it does not exist.

    Args:
        task: settings of the task.
        folder: folder for the files of `task.write`, the checkpoints in `OURS` and `THEIRS`, and the row numbers of our
            length-bucketed batches.

    Raises:
        AntgmmError: the folder contains another task.
    """
    if folder.exists():
        if read(folder)[0] != task:
            raise AntgmmError(f"{folder} contains a comparison with other settings: remove it or choose another --work")
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = draw(task)
    write(task, text, partial)
    for number, name in enumerate(("student", "teacher")):
        _save(language_config(task, name), task.seed + number, partial, name)
    source = stream(task, text, prefetch=0)
    np.save(partial / BUCKETED, np.stack([next(source)["index"] for _ in range(task.steps)]))
    os.replace(partial, folder)


def language_config(task: Task, name: str) -> LMMConfig:
    """Returns the config of the student or teacher, with a minimal image side.

    Args:
        task: settings of the task.
        name: "student" or "teacher".

    Returns:
        Model config.
    """
    layers, width, heads, mlp = getattr(task, name)
    base = preset(BASE)
    eye = replace(base.vision.stack, layers=1, embed=_VISION, heads=1, mlp=_VISION, head_dim=_VISION)
    language = {"layers": layers, "embed": width, "heads": heads, "mlp": mlp}
    decoder = replace(base.language.decoder, **language, q_per_kv=1, head_dim=width // heads, rope_theta=ROPE_THETA)
    return replace(
        base,
        vision=replace(base.vision, stack=eye, image=_VISION, patch=_VISION),
        bridge=replace(base.bridge, mlp=width),
        language=replace(base.language, decoder=decoder, vocab=task.vocab, tied=True),
        image_token=_IMAGE_TOKEN,
    )


def batch_of(task: Task, text: Text, rows: np.ndarray, width: int) -> Arrays:
    """Returns a batch of text rows for this toolkit, without image slots.

    Args:
        task: settings of the task.
        text: all rows.
        rows: row numbers [B].
        width: columns.

    Returns:
        The arrays of `task.padded`, `images` without slots, and `index`.
    """
    none = {"valid": np.zeros((len(rows), 0), bool)}
    return {**padded(task, text, rows, width), "images": none, "index": rows.astype(np.int32)}


def narrow(task: Task, text: Text, rows: np.ndarray) -> Arrays:
    """Returns a batch of rows in the narrowest bucket that fits."""
    width = task.widths[int(np.searchsorted(task.widths, text.lengths[rows].max()))]
    return batch_of(task, text, rows, width)


def stream(task: Task, text: Text, prefetch: int = 2) -> Batches:
    """Returns shuffled batches of rows of similar length, padded to the width of their bucket."""
    groups = np.searchsorted(task.widths, text.lengths)
    return batches(
        lambda rows, rng: narrow(task, text, rows), groups, size=task.batch, seed=task.seed, prefetch=prefetch
    )


def _save(config: LMMConfig, seed: int, folder: Path, name: str) -> None:
    params = jax.tree.map(np.asarray, functional(config).init(jax.random.key(seed)))
    whole, alone = folder / OURS / name, folder / THEIRS / name
    save_hf(config, params, whole)
    alone.mkdir(parents=True)
    tensors = load_file(whole / _WEIGHTS)
    language = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if key.startswith(_PREFIX)}
    save_file(language, alone / _WEIGHTS, metadata={"format": "pt"})
    fields = family(config).to_hf(config)["text_config"]
    # transformers before version 5 reads rope_theta here.
    fields |= {"rope_theta": ROPE_THETA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32"}
    (alone / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
