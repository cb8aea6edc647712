"""Batch sizes from memory: fewer rows for less memory, longer rows and larger models, and never none."""

import jax
import pytest

from antgmm_jax.decoding import crowded
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract, functional
from distill import StepConfig
from experiments.run import batch_size
from experiments.run.batch_size import SHARE, compute_dtype, row_bytes, rows_that_fit
from experiments.run.calibration import scoring_pieces
from experiments.run.rows.random_batches import random_batch
from pruning.costs import cost, total_parameters

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


def test_generation_counts_keys_and_values_twice_and_a_copy_of_the_decoder_that_has_room(monkeypatch):
    layers = 2 * sum(leaf.size for leaf in jax.tree.leaves(abstract(LARGE)["language"]["decoder"]))
    kept = cost(LARGE, 1, ROW["text"], ROW["answer"], itemsize=2).kv_cache

    def by_hand(memory, copied):
        free = SHARE * memory - 2 * total_parameters(LARGE) - copied
        row = row_bytes(LARGE, **ROW, slots=1, itemsize=2) + kept
        return next((n for n in (128, 64, 32, 16, 8, 4, 2) if n * row <= free), 1)

    for platform, memory, copied in (
        ("gpu", 640 * GB, layers),
        ("gpu", 80 * GB, layers),
        ("gpu", 24 * GB, 0),
        ("cpu", 80 * GB, layers),
        ("cpu", 24 * GB, 0),
    ):
        monkeypatch.setattr(batch_size.sharding, "platform", lambda platform=platform: platform)
        assert crowded(layers, memory) is (not copied)
        assert rows(monkeypatch, memory, generated=ROW["answer"]) == by_hand(memory, copied)
    assert rows(monkeypatch, 80 * GB, generated=ROW["answer"]) < rows(monkeypatch, 80 * GB)
    # 26 GB twice would leave no room for more than a row beside 28 GB of parameters.
    assert crowded(2 * layers, 80 * GB) and rows(monkeypatch, 80 * GB, dtype="float32", generated=ROW["answer"]) == 8


@pytest.mark.parametrize(("memory", "accumulate"), [(10**15, 1), (10**15, 4), (30 * GB, 1), (1, 1)])
def test_a_model_is_scored_on_the_rows_of_its_steps_in_parts_that_fit(memory, accumulate):
    table = StepConfig(learning_rate=0.1, batch_size=64, accumulate=accumulate, dtype="bfloat16")
    pieces = scoring_pieces(table, LARGE, 3, **ROW, slots=1, memory=memory)
    assert pieces["batch_size"] * pieces["batches"] == 3 * 64 and 64 % pieces["batch_size"] == 0
    if memory == 10**15:
        assert pieces["batch_size"] == 64 // accumulate
    else:
        assert pieces["batch_size"] < 64 and (memory > 1 or pieces["batch_size"] == 1)


def test_the_rows_are_spread_over_the_devices_of_a_mesh(monkeypatch):
    alone = rows(monkeypatch, 40 * GB)
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert rows(monkeypatch, 40 * GB) >= 8 * alone
        assert rows(monkeypatch, 1 * GB) == 8


def temporaries(config, inputs):
    """Bytes of a forward pass to the last states, by XLA's own count of its temporaries."""
    apply = jax.jit(lambda params, inputs: functional(config).apply(params, inputs, collect=("final",))["final"])
    return apply.lower(abstract(config), inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["llava-tiny", "antgmm-tiny"])
def test_the_estimate_is_above_the_compilers_temporaries(name):
    config, count = preset(name), 8
    batch = random_batch(config, count, words=32, answer=8)
    inputs = {key: batch[key] for key in ("images", "input_ids", "attention_mask", "decoder_input_ids") if key in batch}
    used = temporaries(config, inputs)
    text, slots = batch["input_ids"].shape[1], batch["images"]["valid"].shape[1]
    estimate = count * row_bytes(config, text=text, answer=8, slots=slots, itemsize=4)
    assert used < estimate < 30 * used


def test_the_estimate_counts_no_pairs_of_the_patches_of_a_large_picture():
    """16 384 patches: their pairs alone, which attention within segments never holds, are 4.3 GB with two heads."""
    config, times = preset("qwen2.5-vl-tiny"), 64
    batch = random_batch(config, 2, words=32, answer=8)
    images = {
        name: jax.ShapeDtypeStruct((2, times * leaf.shape[1], *leaf.shape[2:]), leaf.dtype)
        for name, leaf in batch["images"].items()
    }
    slots = images["valid"].shape[1]
    text = batch["input_ids"].shape[1] + (slots - slots // times) * config.bridge_tokens
    ids = jax.ShapeDtypeStruct((2, text), batch["input_ids"].dtype)
    used = temporaries(config, {"images": images, "input_ids": ids, "attention_mask": ids})
    patches = slots * config.tokens["vision"]
    estimate = 2 * row_bytes(config, text=text, answer=8, slots=slots, itemsize=4)
    assert used < estimate < 2 * 8 * config.vision.stack.heads * patches**2


def test_a_cpu_computes_in_float32():
    assert {compute_dtype(dtype) for dtype in ("float32", "bfloat16", "float16")} == {"float32"}
