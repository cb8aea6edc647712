"""Batch sizes from memory: fewer rows for less memory, longer rows and larger models, and never none."""

import jax
import pytest

from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract, functional
from experiments.run import batch_size
from experiments.run.batch_size import compute_dtype, row_bytes, rows_that_fit
from experiments.run.rows.random_batches import random_batch

GB = 1 << 30
LARGE = preset("llava-1.5-7b")
ROW = {"text": 704, "answer": 64}


def rows(monkeypatch, memory, config=LARGE, **changes):
    monkeypatch.setattr(batch_size, "device_memory", lambda: memory)
    return rows_that_fit(config, 128, **{**ROW, "dtype": "bfloat16", **changes})


def test_less_memory_and_longer_rows_give_fewer_rows(monkeypatch):
    sizes = [rows(monkeypatch, memory * GB) for memory in (640, 160, 80, 40, 1)]
    assert sizes[0] == 128 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert rows(monkeypatch, 80 * GB, text=2816) < sizes[2]
    assert rows(monkeypatch, 80 * GB, dtype="float32") < sizes[2]
    assert rows(monkeypatch, 80 * GB, states=GB) < sizes[2]


def test_the_rows_are_spread_over_the_devices_of_a_mesh(monkeypatch):
    alone = rows(monkeypatch, 40 * GB)
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert rows(monkeypatch, 40 * GB) >= 8 * alone
        assert rows(monkeypatch, 1 * GB) == 8


@pytest.mark.parametrize("name", ["llava-tiny", "antgmm-tiny"])
def test_the_estimate_is_above_the_compilers_temporaries(name):
    """Of a forward pass to the last states, per row, by XLA's own count of its temporaries."""
    config, count = preset(name), 8
    batch = random_batch(config, count, words=32, answer=8)
    inputs = {key: batch[key] for key in ("images", "input_ids", "attention_mask", "decoder_input_ids") if key in batch}
    apply = jax.jit(lambda params, inputs: functional(config).apply(params, inputs, collect=("final",))["final"])
    used = apply.lower(abstract(config), inputs).compile().memory_analysis().temp_size_in_bytes
    text, slots = batch["input_ids"].shape[1], batch["images"]["valid"].shape[1]
    estimate = count * row_bytes(config, text=text, answer=8, slots=slots, itemsize=4)
    assert used < estimate < 30 * used


def test_a_cpu_computes_in_float32():
    assert {compute_dtype(dtype) for dtype in ("float32", "bfloat16", "float16")} == {"float32"}
