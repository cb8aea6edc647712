"""Files of a user's rows for tests."""

import io
import json

import numpy as np
from PIL import Image

from data.building import read_all
from data.readers import read_records


def read(kind, path, **about):
    """All records of files; bad rows are refused together."""
    return [record for _, record in read_all(read_records(kind, path, **about), lambda record: record)]


def picture(seed=0, size=(7, 5)):
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="png")
    return stream.getvalue()


def lines(folder, *rows):
    file = folder / "train.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def good(k=0, **more):
    return {"image": f"images/{k}.png", "question": "what?", "answer": f"thing {k}", **more}
