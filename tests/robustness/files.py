"""Files of rows in every format, and pictures."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(size=(3, 2), seed=None):
    """A picture; of random pixels, which cannot be compressed, if it has a seed."""
    stream, shape = io.BytesIO(), (*size[::-1], 3)
    pixels = np.zeros(shape) if seed is None else np.random.default_rng(seed).integers(0, 256, shape)
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format="png")
    return stream.getvalue()


def as_jsonl(folder, rows):
    (folder / "a.png").write_bytes(png())
    lines = [row if isinstance(row, bytes) else json.dumps({"image": "a.png", **row}).encode() for row in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return "jsonl", folder / "rows.jsonl"


def as_json(folder, rows):
    as_jsonl(folder, rows)
    lines = (folder / "rows.jsonl").read_bytes().split(b"\n")
    (folder / "rows.json").write_bytes(b"[" + b",".join(lines) + b"]")
    return "jsonl", folder / "rows.json"


def as_tar(folder, rows):
    members = []
    for number, row in enumerate(rows):
        fields = row if isinstance(row, bytes) else json.dumps(row).encode()
        members += [(f"{number}.png", png()), (f"{number}.json", fields)]
    as_named_tar(folder / "rows.tar", members)
    return "webdataset", folder / "rows.tar"


def as_named_tar(path, members):
    """An archive of these pairs of name and content, in which a name may be repeated."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def as_parquet(folder, rows):
    pq.write_table(_table(rows), folder / "rows.parquet")
    return "parquet", folder / "rows.parquet"


def as_arrow(folder, rows):
    table = _table(rows)
    with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    return "arrow", folder


def as_tfds(folder, rows):
    """A prepared folder of array_record files, as TFDS writes it."""
    import tensorflow_datasets as tfds

    texts = {name: tfds.features.Text() for row in rows for name in row}

    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(encoding_format="png"), **texts}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, row in enumerate(rows):
                yield number, {"image": Image.new("RGB", (3, 2)), **dict.fromkeys(texts, ""), **row}

    with tempfile.TemporaryDirectory() as place:
        builder = Rows(data_dir=place, file_format="array_record")
        builder.download_and_prepare()
        for path in Path(builder.data_dir).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return "tfds", folder


def _table(rows):
    """Columns of the rows; bytes are text that was never checked."""
    columns = {"image": pa.array([png()] * len(rows))}
    for name in {name: None for row in rows for name in row}:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, bytes) for value in values):
            raw = pa.array([value if isinstance(value, bytes) else str(value).encode() for value in values])
            columns[name] = pa.StringArray.from_buffers(len(rows), raw.buffers()[1], raw.buffers()[2])
        else:
            columns[name] = pa.array(values)
    return pa.table(columns)


TEXTS, TABLES = (as_jsonl, as_json, as_tar), (as_parquet, as_arrow)
