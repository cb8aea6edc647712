"""The TFDS builder, prepared and read in a process in which TensorFlow cannot be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)

import numpy as np
import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data.maad.maad_synth import MaadConfig, MaadSynth
from data.readers import read_records

config = MaadConfig(name="s-24", tier="s", samples=24, version="1.0.0")
builder = MaadSynth(config=config, data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
records = {record.id: record for record in read_records("tfds", builder.data_dir, split="test")}
assert len(records) == 24
for record in maad.source("s", "test", 24):
    other = records[record.id]
    np.testing.assert_array_equal(other.images[0], record.images[0])
    assert (other.question, other.answer, other.text) == (record.question, record.answer, record.text)
    assert (other.type, other.slice, other.latents) == (record.type, record.slice, record.latents)
wrong = ((builder.data_dir, "dev", "no split 'dev'"), (sys.argv[1], "test", "is not a prepared TFDS folder"))
for path, split, message in wrong:
    try:
        read_records("tfds", path, split=split)
    except AntgmmError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

import tensorflow_datasets as tfds
from PIL import Image

words = {"role": tfds.features.Text(), "content": tfds.features.Text()}
features = {"images": tfds.features.Sequence(tfds.features.Image(encoding_format="png"))}
features["messages"] = tfds.features.Sequence(words)
shades = [np.full((4, 5, 3), shade, np.uint8) for shade in (9, 70)]
chats = [
    [("user", "<image>\\nwhat?"), ("assistant", "red"), ("user", "and <image>?"), ("assistant", "green")],
    [("system", "s"), ("user", "what?"), ("assistant", "red")],
]


class Chats(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row, chat in enumerate(chats):
            images = [Image.fromarray(shade) for shade in shades[: 2 - 2 * row]]
            yield row, {"images": images, "messages": [{"role": r, "content": c} for r, c in chat]}


builder = Chats(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
rows = sorted(read_records("tfds", builder.data_dir, split="train"), key=lambda record: len(record.images))
assert [len(record.images) for record in rows] == [0, 2]
assert [turn.parts for turn in rows[1].turns] == [(None, "what?"), ("red",), ("and ", None, "?")]
assert [turn.parts for turn in rows[0].turns] == [("s",), ("what?",)]
assert [record.answer for record in rows] == ["red", "green"]
np.testing.assert_array_equal(rows[1].images, shades)
assert "tensorflow" not in sys.modules
print("prepared without TensorFlow")
"""


def test_the_builder_needs_no_tensorflow(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prepared without TensorFlow" in done.stdout


def test_the_generator_imports_no_tfds_torch_or_jax():
    script = "import sys, data.maad; print(*(m for m in ('tensorflow_datasets', 'torch', 'jax') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
