"""A seeded fuzzer: damages one file of a valid set and uses the set. Every fault must be one of our one-line errors."""

import io
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.building import read_all
from data.encoding import Encoder
from data.files import decode_image
from data.limits import BadRow
from data.readers import read_records
from data.record import Record
from experiments.run.export.ends import end_tokens
from tests.experiments.tiny import save_llava, save_teacher
from tests.robustness import files
from tests.robustness.mutations import mutated_bytes, mutated_json

SECONDS = 20.0
"""A case that takes longer hangs."""
GOOD = [
    {"question": "what?", "answer": "red", "id": "a"},
    {"question": "why?", "answer": "ö", "text": "t", "type": "x"},
]


class Target(NamedTuple):
    """A valid set of files and what is done with it.

    Attributes:
        originals: path in the folder -> content.
        uses: functions of the folder; each is called alone.
    """

    originals: Mapping[str, bytes]
    uses: tuple[Callable[[Path], Any], ...]


def fuzz(target: Target, folder: Path, rng: random.Random) -> str:
    """Damages one file, uses the set and restores the file.

    Args:
        target: what to damage.
        folder: empty folder.
        rng: source of the damage.

    Returns:
        Description of the damage; an exception that is not ours passes through with it as a note.
    """
    name = rng.choice(sorted(target.originals))
    for other, content in target.originals.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    what = f"{name}: {_damage(folder / name, rng)}"
    try:
        for use in target.uses:
            begin = time.monotonic()
            with suppress(AntgmmError, BadRow):
                use(folder)
            assert time.monotonic() - begin < SECONDS, f"{what} hangs"
    except BaseException as error:
        error.add_note(what)
        raise
    finally:
        (folder / name).unlink(missing_ok=True)
    return what


def _damage(path: Path, rng: random.Random) -> str:
    content, how = path.read_bytes(), rng.randrange(10)
    if how == 0:
        path.unlink()
        kind = rng.choice(("pipe", "link", "nothing"))
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path)
        return kind
    values = path.suffix in (".json", ".jsonl") and how < 6
    with suppress(ValueError, IndexError):  # not one JSON document
        path.write_bytes(mutated_json(content.decode(), rng) if values else mutated_bytes(content, rng))
        return "a value" if values else "bytes"
    path.write_bytes(mutated_bytes(content, rng))
    return "bytes"


def checkpoint(save: Callable[[Path], Path], place: Path) -> Target:
    """A checkpoint: its model is opened and read, its processor encodes a row."""
    directory = save(place)
    config = open_hf(directory)[0]
    record = Record(images=(np.zeros((40, 30, 3), np.uint8),), question="what?", answer="red")

    def read(folder: Path) -> None:
        for leaf in jax.tree.leaves(open_hf(folder)[1]):
            for _ in leaf.parts():
                pass

    def encode(folder: Path) -> None:
        Encoder(load_processor(folder), config)(record)

    originals = {path.name: path.read_bytes() for path in directory.iterdir()}
    return Target(originals, (read, encode, end_tokens))


def rows(write: Callable[..., tuple[str, Path]], place: Path) -> Target:
    """Files of rows in a format, which are all read."""
    place.mkdir(parents=True)
    kind, path = write(place, GOOD)
    originals = {file.name: file.read_bytes() for file in place.iterdir()}
    split = "train" if kind == "tfds" else ""

    def read(folder: Path) -> None:
        source = read_records(kind, folder if path == place else folder / path.name, split=split)
        for _ in read_all(source, lambda record: record):
            pass

    return Target(originals, (read,))


def pictures() -> Target:
    """Pictures in every format that is decoded."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    originals, exif = {}, image.getexif()
    exif[0x0112] = 6
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "jpeg2000"):
        stream = io.BytesIO()
        image.save(stream, kind, **({"exif": exif} if kind in ("png", "jpeg", "tiff", "webp") else {}))
        originals[f"a.{kind}"] = stream.getvalue()

    def decode(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            with suppress(BadRow):
                assert decode_image(path).dtype == np.uint8

    return Target(originals, (decode,))


def targets(place: Path) -> dict[str, Target]:
    """Returns all targets by name, with their originals made in a folder."""
    made = {
        write.__name__: rows(write, place / write.__name__) for write in (*files.TEXTS, *files.TABLES, files.as_tfds)
    }
    models = {"with decoder": save_llava, "with encoder": save_teacher}
    made |= {name: checkpoint(save, place / name / "model") for name, save in models.items()}
    return {**made, "pictures": pictures()}
