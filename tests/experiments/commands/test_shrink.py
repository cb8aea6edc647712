"""`antgmm shrink` on rows keeps what the scores of these rows say."""

import jax
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf, open_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import functional
from data import maad
from data.readers import read_records
from data.record import Record
from data.source import InMemorySource
from data.writers import write_jsonl
from experiments.run import disk_cut
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava


def test_shrink_keeps_the_layers_and_units_that_change_most_on_the_rows(antgmm, tmp_path):
    teacher, rows = save_llava(tmp_path / "teacher"), tmp_path / "rows.jsonl"
    write_jsonl(maad.source("s", "train", 6), rows)
    words = ["--size", "text/layers=1", "--size", "text/mlp=0.5", "--data", f"jsonl:{rows}", "--samples", "6"]
    antgmm("shrink", teacher, *words, "--out", "out")
    config, params = load_hf(teacher)
    (batch,) = Samples(read_records("jsonl", rows), load_processor(teacher), config).in_order(6)
    apply = functional(config).apply
    scores = pruning.block_influence(apply, params, [batch], [towers(config)["text"]])
    scores |= pruning.activation(apply, params, [batch], ["text/mlp"], ["text/mlp"])
    keep = pruning.plan(scores, config, {"text/layers": 1, "text/mlp": 0.5})
    smaller, cut = load_hf(tmp_path / "out")
    expected, params = pruning.shrink(config, params, keep)
    assert smaller == expected
    jax.tree.map(np.testing.assert_array_equal, cut, params)
    assert "pruned by its activations on 6 rows" in (tmp_path / "out" / "README.md").read_text()


def test_rows_without_images_are_refused_for_a_cut_of_the_image_side(tmp_path):
    rows = [Record(images=(), question=f"what is {word}?", text="", answer="$5.") for word in ("red", "blue")]
    teacher = save_llava(tmp_path / "teacher")
    with pytest.raises(AntgmmError, match="^vision/mlp: all importance scores are 0"):
        disk_cut.cut(teacher, {"vision/mlp": 16}, tmp_path / "out", records=InMemorySource(rows))
    assert not (tmp_path / "out").exists()
    # The bridge has a width of the language model's, and nothing goes through it.
    disk_cut.cut(teacher, {"text/embed": 16}, tmp_path / "out", records=InMemorySource(rows))
    assert sizes(open_hf(tmp_path / "out")[0])["bridge/mlp"] == 16
