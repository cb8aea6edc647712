"""Benchmarks: counted FLOPs, equal work on both sides, memory; no test asserts a speed."""

import mmap
import sys

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.io.convert import load_hf
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from distill import LossConfig, make_loss
from experiments.lab.bench import cutting, flops, ratios, timing
from experiments.lab.bench import decode_speed as decoding
from experiments.lab.bench.batches import device_arrays
from experiments.report import latency
from experiments.run import disk_cut
from experiments.run.export.ends import end_tokens
from experiments.run.host import resources
from experiments.run.rows.random_batches import random_batch
from tests import reference
from tests.marks import long

CONFIG = blip2_t5(
    vision=(1, 256, 4, 512),
    bridge=(2, 256, 4, 512),
    text=(1, 1, 256, 4, 512),
    head_dims=(64, 64, 64),
    image=64,
    patch=16,
    queries=16,
    vocab=1024,
    image_token=3,
)


def test_sides_take_turns_and_warm_up_rounds_are_not_timed():
    called = []
    seconds = timing.in_turn({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, warmup=2)
    assert called == ["a", "b"] * 5
    assert {name: values.shape for name, values in seconds.items()} == {"a": (3,), "b": (3,)}
    assert all((values >= 0).all() for values in seconds.values())


def test_with_threads_restores_pytorchs_thread_count():
    before = torch.get_num_threads()
    assert latency.with_threads(1, torch.get_num_threads) == 1
    assert torch.get_num_threads() == before


def test_spread_is_median_and_quartiles():
    assert timing.spread(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.long
def test_step_flops_agree_with_the_compilers_count():
    batch = random_batch(CONFIG, 4, **decoding.PROMPT)
    arrays = device_arrays(batch)
    params = functional(CONFIG).init(jax.random.key(0))
    loss = make_loss(functional(CONFIG), LossConfig(hard=1.0))
    compiled = jax.jit(jax.grad(lambda p: loss(p, {}, arrays, {})[0])).lower(params).compile()
    head = 2 * batch["targets"].size * 256 * 1024  # the teacher's head is not in this program
    counted = compiled.cost_analysis()["flops"]
    # Every stack has one layer in its scan, so the compiler counts all FLOPs. Only the compiler counts norms and
    # activations; pixels and tokens need no gradient.
    assert flops.step_flops(CONFIG, CONFIG, batch) - head == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("model", [long(reference.blip2), reference.llava])
def test_random_batches_give_equal_logits_in_both_engines(tmp_path, model):
    directory = reference.saved(model(), tmp_path / "model")
    config, params = load_hf(directory)
    batch = random_batch(config, 2, words=5, answer=4)
    out = functional(config).apply(params, device_arrays(batch))["logits"]
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {"pixel_values": as_hf(batch["images"]), **{name: batch[name] for name in names if name in batch}}
    expected = reference.logits(reference.reloaded(directory), {k: _long(v) for k, v in inputs.items()})
    reference.close(np.asarray(out), expected)
    # `positions` point at the state that predicts each target.
    if "decoder_input_ids" not in batch:
        followed = np.take_along_axis(batch["input_ids"], batch["positions"] + 1, axis=1)
        np.testing.assert_array_equal(followed, batch["targets"])
    eos, pad = end_tokens(directory)
    assert (eos, pad) == (1, 0)


def _long(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype == np.int32 else array


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # warnings of PyTorch and transformers
def test_decoding_and_requests_compare_the_same_answers(tmp_path):
    teacher = reference.saved(reference.blip2(), tmp_path / "teacher")
    student = reference.saved(reference.blip2(vision=(1, 32, 4, 24)), tmp_path / "student")
    decoded = decoding.decoding(teacher, 2, 5, 3)
    assert decoded["equal"]
    assert decoded["torch_threads"] in decoding.thread_counts()
    assert {f"torch_{count}_ms" for count in decoding.thread_counts()} < set(decoded)
    figures = decoding.requests(teacher, student, 3, 3)
    for engine in ("jax", "torch"):
        assert set(figures[engine]) == {"teacher", "student", "ratio"}
        assert figures[engine]["ratio"] == figures[engine]["teacher"]["p50"] / figures[engine]["student"]["p50"]


@pytest.mark.long
def test_importance_and_step_run_on_a_tiny_model():
    scored = ratios.importance(CONFIG, 2, 3)
    assert scored["ratio"]["median"] > 0
    step = ratios.distillation_step(CONFIG, 2, 64, 3)
    assert step["share"]["median"] > 0
    assert step["flops"] == flops.step_flops(CONFIG, CONFIG, random_batch(CONFIG, 2, **decoding.PROMPT))


def test_a_cut_that_keeps_all_units_copies_the_checkpoint(tmp_path):
    config = preset("llava-tiny")
    cutting.random_checkpoint(config, tmp_path / "a")
    assert load_hf(tmp_path / "a")[0] == config
    disk_cut.cut(tmp_path / "a", disk_cut.targets_of(config, "llava-tiny"), tmp_path / "b", records=None)
    disk_cut.cut(tmp_path / "a", {**sizes(config), "text/layers": 3}, tmp_path / "c", records=None)
    whole, same, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert same == whole and len(cut) < len(whole)
    figures = cutting.shrinking("llava-tiny", "llava-tiny", tmp_path)
    assert figures["score"]["read"] == figures["cut"]["read"] == 2 * figures["params"]["source"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_includes_freed_memory():
    size, freed = 1 << 26, 1 << 20  # other pages of the process may be freed meanwhile
    pages = mmap.mmap(-1, size + freed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with resources.PeakMemory() as memory, pages:
        pages.write(b"x" * (size + freed))
        seen = resources.memory("RssAnon")
        while memory._peak < seen:  # until the next sample
            pass
    assert memory.figures["beyond"] >= size
    assert resources.memory("RssAnon") < memory.figures["before"] + memory.figures["beyond"]
