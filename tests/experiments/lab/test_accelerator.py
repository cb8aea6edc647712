"""The accelerator benchmark: counted FLOPs, reported figures and errors; no test asserts a speed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax import presets
from antgmm_jax.blocks.language import LanguageModel
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.pure import abstract, functional
from distill import LossConfig, make_loss
from experiments.lab.bench import accelerator, checks, peaks, timing, training
from experiments.lab.bench.accelerator import Settings, defaults
from experiments.lab.bench.batches import device_arrays
from experiments.lab.bench.checks import Check, refuse
from experiments.lab.bench.flops import scoring_flops, step_flops, traced_flops
from experiments.lab.bench.training import Limits, shares
from experiments.lab.planning.chips import CHIPS, published
from experiments.run.rows.random_batches import random_batch

# The checks of the device may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")

BLIP2 = blip2_t5(
    vision=(2, 32, 2, 48),
    bridge=(3, 32, 2, 48),
    text=(2, 3, 32, 2, 48),
    head_dims=(16, 16, 16),
    image=32,
    patch=16,
    queries=4,
    vocab=64,
    image_token=3,
)
LLAVA = llava(
    vision=(2, 32, 2, 48),
    text=(3, 32, 2, 48),
    head_dims=(16, 16),
    image=32,
    patch=16,
    vocab=64,
    image_token=3,
    q_per_kv=2,
)
TINY = Settings("test", "test", "float32", (2, 4), (1, 2), words=5, answer=4, matmul=(16, 32), copied=4096, rounds=3)


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "test", LLAVA)
        yield accelerator.measure(TINY)


def test_mfu_by_hand():
    # 6 TFLOP in 2 s are 3 TFLOP/s: 0.3 of the 10 measured, 0.15 of the 20 published.
    computed = shares(6e12, np.array([1.0, 2.0, 4.0]), Limits(10e12, 20e12))
    assert computed["mfu"] == pytest.approx({"median": 0.3, "low": 0.225, "high": 0.45})
    assert computed["mfu_published"] == pytest.approx({"median": 0.15, "low": 0.1125, "high": 0.225})
    assert shares(6e12, np.ones(3), Limits(10e12, None))["mfu_published"] is None


@pytest.mark.parametrize("config", [BLIP2, LLAVA], ids=["blip2_t5", "llava"])
def test_forward_flops_equal_those_of_the_traced_products(config):
    loss = make_loss(functional(config), LossConfig(hard=1.0))
    batch = random_batch(config, 3, words=5, answer=4)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), device_arrays(batch))
    traced = jax.jit(lambda params, batch: loss(params, {}, batch, {})[0]).trace(abstract(config), arrays)
    assert traced_flops(traced.jaxpr) == scoring_flops(config, batch)
    assert traced_flops(traced.jaxpr, loops_once=True) < scoring_flops(config, batch)


def test_step_flops_are_three_forward_passes_plus_the_teachers_part():
    batch = random_batch(BLIP2, 3, words=5, answer=4)
    forward, head = scoring_flops(BLIP2, batch), 2 * 3 * 4 * 32 * 64
    assert step_flops(BLIP2, BLIP2, batch) == 3 * forward + head
    assert step_flops(BLIP2, BLIP2, batch, online=True) == 4 * forward


def test_traced_flops_count_every_iteration_of_a_loop():
    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    jaxpr = jax.make_jaxpr(jax.jit(scanned))(jnp.ones((3, 8)), jnp.ones((5, 8, 8)))
    assert traced_flops(jaxpr) == 5 * 2 * 3 * 8 * 8
    assert traced_flops(jaxpr, loops_once=True) == 2 * 3 * 8 * 8
    endless = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x))(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="loop of unknown length"):
        traced_flops(endless)


def test_calls_go_to_the_device_in_rounds():
    called = []
    seconds = timing.dispatched(lambda: called.append(0), 3, least=0.0)
    assert seconds.shape == (3,) and (seconds > 0).all()
    assert len(called) == 2 + 3  # two calls warm up; a round of at least 0 s has one call


def test_rates_report_the_fastest_size_and_kernel():
    measured = peaks.matmul_rate("bfloat16", (16, 64), 3)
    assert measured["median"] == max(each["median"] for each in measured["sides"].values())
    assert measured["sides"][str(measured["side"])]["median"] == measured["median"]
    copied = peaks.copy_rate(4096, 3)
    assert copied["bytes"] == 4096 and set(copied["kernels"]) == {"copy", "triad"}
    assert copied["median"] == copied["kernels"][copied["kernel"]]["median"]


@pytest.mark.long
def test_a_whole_run_reports_device_dtype_and_every_figure_with_its_spread(figures):
    read = json.loads(json.dumps(figures))
    assert read["device"]["platform"] == "cpu" and read["device"]["jax"] == jax.__version__
    assert read["settings"]["dtype"] == "float32" and read["published"] is None
    names = ["float32 forward", "bfloat16 forward", "cached decode", "greedy answers", "bfloat16 gradients"]
    assert [check["name"] for check in read["checks"]["student"]] == names
    assert all(0 <= check["error"] <= check["allowed"] for check in read["checks"]["student"])
    assert read["checks"]["student"][0]["against"] == "PyTorch"

    def median(value):
        assert 0 < value["low"] <= value["median"] <= value["high"]
        return value["median"]

    for source in ("cached", "online"):
        trained = read["train"][source]
        assert [each["batch"] for each in trained["sizes"]] == [2, 4] and trained["full_at"] is None
        for each in trained["sizes"]:
            batch = random_batch(LLAVA, each["batch"], words=5, answer=4)
            assert each["flops"]["needed"] == step_flops(LLAVA, LLAVA, batch, online=source == "online")
            assert each["flops"]["traced_loops_once"] < each["flops"]["traced"]
            assert median(each["mfu"]) > 0 and each["mfu_published"] is None
            assert median(each["ms"]) * median(each["samples_per_second"]) == pytest.approx(1e3 * each["batch"])
        assert trained["best"] in trained["sizes"]
    for model in ("student", "teacher"):
        assert median(read["scoring"][model]["mfu"]) > 0
        assert [each["batch"] for each in read["decode"][model]] == [1, 2]
        assert all(median(each["tokens_per_second"]) * median(each["copy_share"]) > 0 for each in read["decode"][model])
        phases = read["requests"][model]
        assert list(phases) == ["whole", "vision", "prefill", "decode"]
        assert all(median(phase["ms"]) > 0 and phase["roofline"] > 0 for phase in phases.values())
    assert read["matmul_after"]["side"] == read["matmul"]["float32"]["side"]


@pytest.mark.long
def test_the_command_writes_and_prints_what_was_measured(antgmm, figures, monkeypatch, tmp_path):
    settings = []
    monkeypatch.setattr(accelerator, "measure", lambda given: settings.append(given) or figures)
    out = tmp_path / "deep" / "figures.json"
    words = ("--student", "llava-tiny", "--batch", "4", "--batch", "2", "--out", str(out))
    printed = antgmm("lab", "accelerator", *words, "--json")
    assert json.loads(printed.stdout) == json.loads(out.read_text()) == json.loads(json.dumps(figures))
    assert settings == [defaults("cpu", None)._replace(student="llava-tiny", batches=(2, 4))]
    shown = antgmm("lab", "accelerator").stdout
    for text in ("cpu (cpu)", "computed in float32", "float32 forward", "teacher cached", "teacher online", "tokens/s"):
        assert text in shown


@pytest.mark.long
def test_a_device_that_computes_wrongly_is_not_timed(monkeypatch):
    # Programs are kept by config: one of another test, compiled with the right step, would hide the fault.
    jax.clear_caches()
    monkeypatch.setitem(presets.PRESETS, "test", LLAVA)
    monkeypatch.setattr(accelerator, "matmul_rate", lambda *_: pytest.fail("timed"))
    step = LanguageModel.step

    def astray(self, ids, state, *rest):
        return step(self, ids, state._replace(slot=state.slot + 1), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "step", astray)
        with pytest.raises(
            AntgmmError, match="student, cached decode: .* without cache, 0.0001 is allowed: the device"
        ):
            accelerator.measure(TINY)
    jax.clear_caches()
    right = checks.torch_logits
    monkeypatch.setattr(checks, "torch_logits", lambda *given: 1.001 * right(*given))
    with pytest.raises(AntgmmError, match="student, float32 forward: a relative difference of 0.001 from PyTorch"):
        accelerator.measure(TINY)


def test_a_check_with_error_nan_is_refused():
    refuse({"student": [Check("a", "b", 0.1, 0.1)]})
    with pytest.raises(AntgmmError, match="student, a"):
        refuse({"student": [Check("a", "b", float("nan"), 0.1)]})
    ones = [np.ones(2), np.ones(2), np.ones(2)]
    assert np.isnan(checks._furthest([np.ones(2), np.full(2, np.nan), np.ones(2)], ones))
    assert checks._furthest([np.ones(2), np.ones(2), np.zeros(2)], ones) == 1.0


def test_running_out_of_memory_ends_the_sweep(monkeypatch):
    def step(lesson, batch, limits, rounds):
        if len(batch["targets"]) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"batch": len(batch["targets"]), "mfu": {"median": 0.5}}

    monkeypatch.setattr(training, "_step", step)
    lesson = training.Lesson(BLIP2, BLIP2, None, True, jnp.float32)
    batch = random_batch(BLIP2, 8, words=5, answer=4)
    swept = training.sweep(lesson, batch, (1, 2, 4, 8), Limits(1.0, None), 3)
    assert swept["full_at"] == 4 and [each["batch"] for each in swept["sizes"]] == [1, 2]
    with pytest.raises(AntgmmError, match="a step at batch 4: use a smaller --batch"):
        training.sweep(lesson, batch, (4, 8), Limits(1.0, None), 3)


def test_defaults_depend_on_the_device():
    assert defaults("cpu", None).dtype == "float32"
    h100, small, silent = (defaults("gpu", held) for held in (int(60e9), int(18e9), None))
    assert (h100.student, h100.teacher, h100.dtype) == ("antgmm-300m", "antgmm-5b", "bfloat16")
    assert small.teacher == silent.teacher == "antgmm-300m"


def test_a_published_peak_needs_the_exact_device_name():
    assert published("NVIDIA H100 80GB HBM3") == CHIPS["H100"]
    assert published("NVIDIA H100 PCIe") is None and published("cpu") is None


def test_models_and_dtypes_that_do_not_fit_are_refused():
    with pytest.raises(AntgmmError, match="the student's image side is 96"):
        accelerator.measure(TINY._replace(student="antgmm-tiny", teacher="antgmm-300m"))
    with pytest.raises(AntgmmError, match="--dtype float16: it must be bfloat16 or float32"):
        accelerator.measure(TINY._replace(student="antgmm-tiny", teacher="antgmm-tiny", dtype="float16"))
