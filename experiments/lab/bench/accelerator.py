"""Benchmark of one device: correctness, peak rates, and training and serving relative to these rates."""

import gc
import importlib.metadata
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.presets import preset
from antgmm_jax.pure import Params, functional
from distill.teacher import to_dtype
from experiments.lab.bench.batches import cached_teacher, first
from experiments.lab.bench.checks import correctness, refuse
from experiments.lab.bench.peaks import PRODUCTS, copy_rate, matmul_rate
from experiments.lab.bench.serving import Model, decoding, requests, scoring
from experiments.lab.bench.training import Lesson, Limits, sweep
from experiments.lab.planning import step as planning
from experiments.lab.planning.chips import published
from experiments.run.host.console import say
from experiments.run.host.facts import machine
from experiments.run.rows.random_batches import random_batch

_DRIVER = Path("/proc/driver/nvidia/version")
_CHECKED = 2  # rows for the correctness checks
LARGE = 50e9
"""Bytes of memory from which the largest preset is the teacher; JAX uses 60 GB of an 80 GB device."""


class Settings(NamedTuple):
    """Settings of the benchmark.

    Attributes:
        student: preset of the student, which is trained and served.
        teacher: preset of the teacher, which is served too.
        dtype: dtype of computation, a key of `peaks.PRODUCTS`.
        batches: batch sizes of the train step, ascending.
        served: batch sizes of decoding; scoring uses the largest one.
        words: prompt tokens, not counting image tokens.
        answer: answer tokens.
        matmul: sides of the matrices for the matmul rate.
        copied: bytes of the arrays for the copy rate.
        rounds: measured rounds.
    """

    student: str = "antgmm-tiny"
    teacher: str = "antgmm-tiny"
    dtype: str = "float32"
    batches: tuple[int, ...] = (8, 32)
    served: tuple[int, ...] = (1, 8)
    words: int = 32
    answer: int = 16
    matmul: tuple[int, ...] = (1024, 2048)
    copied: int = 1 << 27
    rounds: int = 5


def defaults(platform: str, held: int | None) -> Settings:
    """Returns the default settings for a device.

    Args:
        platform: "cpu", "gpu" or "tpu".
        held: bytes of memory that JAX may use; None if unknown.

    Returns:
        A tiny float32 model for a CPU. For an accelerator, a student with 300 million parameters in bfloat16, whose
        teacher has 5 billion parameters if it fits in float32 together with a train step, else is the student itself.
    """
    if platform == "cpu":
        return Settings()
    large = held is not None and held >= LARGE
    return Settings(
        student="antgmm-300m",
        teacher="antgmm-5b" if large else "antgmm-300m",
        dtype="bfloat16",
        batches=(32, 64, 128, 256, 512),
        served=(1, 64),
        words=96,
        answer=48,
        matmul=(2048, 4096, 8192, 16384),
        copied=1 << 30,
        rounds=9,
    )


def memory(name: str = "bytes_limit") -> int | None:
    """Returns a memory statistic of the first device, by default the limit; None if unknown (on a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def measure(settings: Settings) -> dict[str, Any]:
    """Runs the benchmark on the first device of JAX.

    Args:
        settings: the settings.

    Returns:
        Figures as JSON types: `device`, `settings` (the settings), `checks`, `matmul` and `copy` rates, `train`,
        `scoring`, `decode`, `requests`, `matmul_after` (the rate at the end) and `memory`.

    Raises:
        AntgmmError: student and teacher do not fit each other, the device computes wrong results, or its memory is too
            small.
    """
    student, teacher = preset(settings.student), preset(settings.teacher)
    batch = _batch(settings, student)
    planning.check(
        planning.StepSpec(student, teacher, len(batch["index"]), batch["input_ids"].shape[1], settings.answer)
    )
    if settings.dtype not in ("bfloat16", "float32"):
        raise AntgmmError(f"--dtype {settings.dtype}: it must be bfloat16 or float32")
    figures: dict[str, Any] = {"device": device(), "settings": settings._asdict()}
    models = {"student": student, "teacher": teacher}
    say("accelerator: correctness")
    distinct = {name: config for name, config in models.items() if name == "student" or teacher != student}
    checks = {name: correctness(config, _params(config), first(batch, _CHECKED)) for name, config in distinct.items()}
    refuse(checks)
    figures["checks"] = {name: [check._asdict() for check in each] for name, each in checks.items()}
    say("accelerator: rates of matrix products and copies")
    figures["matmul"] = {kind: matmul_rate(kind, settings.matmul, settings.rounds) for kind in PRODUCTS}
    figures["copy"] = copy_rate(settings.copied, settings.rounds)
    rate, copy = figures["matmul"][settings.dtype], figures["copy"]["median"]
    chip = published(figures["device"]["kind"])
    peak = chip.flops if chip is not None and settings.dtype == "bfloat16" else None
    figures["published"] = None if chip is None else {"flops": chip.flops, "bandwidth": chip.bandwidth}
    limits = Limits(rate["median"], peak)
    figures["train"] = _training(settings, models, batch, limits)
    served = {name: Model(config, _params(config, settings.dtype)) for name, config in models.items()}
    largest = first(batch, max(settings.served))
    figures["scoring"] = {name: scoring(model, largest, limits, settings.rounds) for name, model in served.items()}
    figures["decode"] = {
        name: [decoding(model, first(batch, rows), copy, settings.rounds) for rows in settings.served]
        for name, model in served.items()
    }
    figures["requests"] = requests(served, batch, limits, copy, 4 * settings.rounds)
    figures["matmul_after"] = matmul_rate(settings.dtype, [rate["side"]], settings.rounds)
    # JAX reports one peak for the whole process.
    figures["memory"] = {"limit": memory("bytes_limit"), "peak": memory("peak_bytes_in_use")}
    return figures


def device() -> dict[str, Any]:
    """Returns facts about the device, its driver and the JAX version."""
    first_device = jax.devices()[0]
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else ""
    return {
        "kind": first_device.device_kind,
        "platform": first_device.platform,
        "backend": first_device.client.platform_version,
        "driver": driver,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "host": machine(),
    }


def _batch(settings: Settings, config: LMMConfig) -> dict[str, np.ndarray]:
    rows = max(*settings.batches, *settings.served, _CHECKED)
    return random_batch(config, rows, words=settings.words, answer=settings.answer)


def _params(config: LMMConfig, dtype: str = "float32") -> Params:
    """Random parameters, cast inside the same program to avoid a second copy."""
    return jax.jit(lambda key: to_dtype(functional(config).init(key), jnp.dtype(dtype)))(jax.random.key(0))


def _training(
    settings: Settings, models: Mapping[str, LMMConfig], batch: Mapping[str, np.ndarray], limits: Limits
) -> dict[str, Any]:
    """Train steps with an online and with a cached teacher; of the latter only the head stays on the device."""
    student, teacher = models["student"], models["teacher"]
    sizes, most = sorted(settings.batches), max(settings.batches)
    lesson = partial(Lesson, student, teacher, dtype=jnp.dtype(settings.dtype))
    params = _params(teacher, settings.dtype)
    source = distill.online(functional(teacher), params)
    results = {"online": sweep(lesson(source, True), first(batch, most), sizes, limits, settings.rounds)}
    source = cached_teacher(teacher, params, first(batch, most))
    del params
    gc.collect()  # frees arrays that tracebacks or traced programs still hold
    return {"cached": sweep(lesson(source, False), first(batch, most), sizes, limits, settings.rounds), **results}
