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
