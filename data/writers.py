"""Writers of records: Parquet (readable by Hugging Face datasets), or JSONL with images. Writes are atomic."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.io.folders import new_file
from data.maad.drawing import MaadSource, fingerprint, source
from data.maad.latents import SIZES
from data.record import Record, prompt

if TYPE_CHECKING:
    import pyarrow

Progress = Callable[[str, int, int], None]
_WORDS = ("question", "answer", "text", "type", "id", "slice")
_ROWS = 512
CAPTION = "what is pictured?"
OTHERS = 5
"""Further questions of a dialogue."""


def _silent(name: str, done: int, total: int) -> None:
    """Shows no progress."""


def _schema(latents: Sequence[str]) -> "pyarrow.Schema":
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), *((name, pa.string()) for name in _WORDS)]
    features: dict = {name: {"dtype": "string", "_type": "Value"} for name in _WORDS}
    features["image"] = {"_type": "Image"}
    if latents:
        fields.append(("latents", pa.struct([(name, pa.int32()) for name in latents])))
        features["latents"] = {name: {"dtype": "int32", "_type": "Value"} for name in latents}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def png(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3], as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="png", compress_level=4)
    return stream.getvalue()


def write_parquet(records: Sequence[Record], path: str | Path, *, progress: Progress = _silent) -> None:
    """Writes records as a Parquet file for `read_records("parquet", path)` and Hugging Face datasets.

    Args:
        records: at least one record; all must have the same latents.
        path: the file; it is replaced at the end.
        progress: called with (file name, records done, number of records).

    Raises:
        AntgmmError: there are no records, the file cannot be written, or pyarrow is not installed.
    """
    require("parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not len(records):
        raise AntgmmError(f"{path}: no records to write")
    schema = _schema([*records[0].latents])
    with new_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for first in range(0, len(records), _ROWS):
            part = [records[row] for row in range(first, min(first + _ROWS, len(records)))]
            writer.write_table(pa.Table.from_pylist([_plain(record) for record in part], schema=schema))
            progress(path.name, first + len(part), len(records))


def write_jsonl(records: Sequence[Record], path: str | Path, *, progress: Progress = _silent) -> None:
    """Writes records as a JSONL file for `read_records("jsonl", path)`, with PNG images in the folder `images`.

    Empty fields and latents are left out.

    Args:
        records: at least one record.
        path: the file; it is replaced at the end. Names of images start with its name.
        progress: called with (file name, records done, number of records).

    Raises:
        AntgmmError: there are no records, or a file cannot be written.
    """
    write_lines(records, Path(path), _line, progress)


def write_chat(records: Sequence[Record], path: str | Path, *, progress: Progress = _silent) -> None:
    """Writes records with one image as conversations: a JSONL file for `read_records("jsonl", path)`, with PNG images.

    Each row asks about its own image, and then about that of the next record.

    Args:
        records: at least one record.
        path: the file; it is replaced at the end. Names of images start with its name.
        progress: called with (file name, records done, number of records).

    Raises:
        AntgmmError: there are no records, or a file cannot be written.
    """
    path = Path(path)

    def line(row: int, record: Record, names: Sequence[str]) -> dict:
        following = (row + 1) % len(records)
        exchanges = ((names[0], record), (_image_name(path, following), records[following]))
        turns = [turn for name, each in exchanges for turn in _exchange(name, each)]
        return {"id": record.id, "type": exchanges[1][1].type, "messages": turns}

    write_lines(records, path, line, progress)


def write_captions(records: MaadSource, path: str | Path, *, progress: Progress = _silent) -> None:
    """Writes MAAD-synth's images with one question, what they show: a language model learns to look before it compares.

    Beside a text that agrees with the image half of the time it learns to copy the text.

    Args:
        records: at least one record.
        path: as in `write_chat`.
        progress: as in `write_chat`.

    Raises:
        AntgmmError: as in `write_chat`.
    """

    def line(row: int, record: Record, names: Sequence[str]) -> dict:
        return {"id": record.id, "image": names[0], "question": CAPTION, "answer": records.caption(row)}

    write_lines(records, Path(path), line, progress)


def write_dialogues(records: MaadSource, path: str | Path, *, progress: Progress = _silent) -> None:
    """Writes MAAD-synth as conversations about one image each: the question of the record, and `OTHERS` further ones.

    A model learns more answers from the same tokens than from single questions.

    Args:
        records: at least one record.
        path: as in `write_chat`.
        progress: as in `write_chat`.

    Raises:
        AntgmmError: as in `write_chat`.
    """

    def line(row: int, record: Record, names: Sequence[str]) -> dict:
        turns = _exchange(names[0], record)
        for other in records.others(row, OTHERS):
            turns += _turns(prompt(other.question, ""), other.answer)
        return {"id": record.id, "type": record.type, "messages": turns}

    write_lines(records, Path(path), line, progress)


def write_lines(
    records: Sequence[Record],
    path: Path,
    line: Callable[[int, Record, Sequence[str]], dict],
    progress: Progress = _silent,
) -> None:
    """Writes records as a JSONL file of any form, with PNG images in the folder `images` beside it.

    Args:
        records: at least one record.
        path: the file; it is replaced at the end. Names of images start with its name.
        line: (row, record, names of its images) -> JSON object.
        progress: called with (file name, records done, number of records).

    Raises:
        AntgmmError: there are no records, or a file cannot be written.
    """
    if not len(records):
        raise AntgmmError(f"{path}: no records to write")
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for row in range(len(records)):
            record, names = records[row], []
            for place, image in enumerate(record.images):
                names.append(_image_name(path, row, place))
                with new_file(path.parent / names[-1]) as picture:
                    picture.write_bytes(png(image))
            lines.write(json.dumps(line(row, record, names), ensure_ascii=False) + "\n")
            progress(path.name, row + 1, len(records))


def _image_name(path: Path, row: int, place: int = 0) -> str:
    return f"images/{path.stem}-{row:06d}{f'-{place}' if place else ''}.png"


def _line(row: int, record: Record, names: Sequence[str]) -> dict:
    """A record as an object of a JSONL file, without empty fields."""
    shown = {"image": names[0]} if len(names) == 1 else {"images": [*names]}
    return {**shown, **{word: getattr(record, word) for word in _WORDS if getattr(record, word)}}


def _exchange(name: str, record: Record) -> list[dict]:
    """A question about an image and its answer, as two turns."""
    question = [{"type": "image", "path": name}, {"type": "text", "text": prompt(record.question, record.text)}]
    return _turns(question, record.answer)


def _turns(question: str | list[dict], answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_WRITERS = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "captions": write_captions,
    "chat": write_chat,
    "dialogues": write_dialogues,
}


def _plain(record: Record) -> dict:
    if len(record.images) != 1:
        raise AntgmmError(f"{record.id} has {len(record.images)} images: Parquet supports only records with one")
    image = {"bytes": png(record.images[0]), "path": f"{record.id or 'image'}.png"}
    return {"image": image, **{name: getattr(record, name) for name in _WORDS}, "latents": dict(record.latents)}


def write_maad(
    tier: str,
    folder: str | Path,
    *,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    form: str = "parquet",
    progress: Progress = _silent,
) -> dict:
    """Writes splits of MAAD-synth as `SPLIT.parquet` or `SPLIT.jsonl`, and a description `maad.json`.

    Args:
        tier: `s`, `m` or `full`.
        folder: target folder; files of an earlier call are replaced.
        sizes: split -> number of records.
        seed: seed of the data set.
        form: `parquet`, `jsonl` with images in `images`, `captions`, JSONL with what images show,
            or `chat` or `dialogues`, conversations as JSONL about two images or about one.
        progress: called with (file name, records done, number of records).

    Returns:
        Contents of `maad.json`: tier, seed, sizes and a fingerprint of each split.

    Raises:
        AntgmmError: no such tier or split, a file exists that no such call has written, or one cannot be written.
    """
    folder = Path(folder)
    suffix = "parquet" if form == "parquet" else "jsonl"
    files = {split: folder / f"{split}.{suffix}" for split in sizes}
    description = folder / "maad.json"
    if not description.exists() and (other := [path for path in files.values() if path.exists()]):
        raise AntgmmError(f"{other[0]} exists and is not of MAAD-synth: choose another folder or move it")
    splits = {split: source(tier, split, size, seed=seed) for split, size in sizes.items()}
    fingerprints = {split: fingerprint(records) for split, records in splits.items()}
    info = {"tier": tier, "seed": seed, "sizes": dict(sizes), "fingerprints": fingerprints}
    with new_file(description) as partial:  # first: the files of an interrupted call may be replaced by the next one
        partial.write_text(json.dumps(info, indent=2) + "\n")
    for split, records in splits.items():
        _WRITERS[form](records, files[split], progress=progress)
    return info
