"""One device measured from end to end: correctness first, then what it reaches, then each piece of work as a share."""

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
from experiments.run.random_batches import random_batch

_DRIVER = Path("/proc/driver/nvidia/version")
_CHECKED = 2  # rows that are compared
LARGE = 50e9
"""Bytes from which on the largest preset is the teacher: what JAX takes of an 80 GB device, three quarters, is more."""


class Asked(NamedTuple):
    """What is measured.

    Attributes:
        student: preset that is trained and served.
        teacher: preset that it learns from, and that is served beside it.
        dtype: what both compute in, a name of `peaks.PRODUCTS`.
        batches: batch sizes of the train step, rising.
        served: batch sizes of decoding; scoring takes the largest of them.
        words: prompt tokens beside the image's.
        answer: answer tokens.
        matmul: sides of the matrices that give the matmul rate.
        copied: bytes of the arrays that give the copy rate.
        rounds: rounds that are timed.
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


def defaults(platform: str, held: int | None) -> Asked:
    """What is measured on a device unless it is asked otherwise.

    Args:
        platform: "cpu", "gpu" or "tpu".
        held: bytes that JAX may take of it; None where it does not tell.

    Returns:
        On a CPU a tiny model in float32. On an accelerator bfloat16 and a student of 300 million parameters, with the
        paper's teacher of 5 thousand million where its float32 form and a step beside it fit, else its own teacher.
    """
    if platform == "cpu":
        return Asked()
    large = held is not None and held >= LARGE
    return Asked(
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
    """One of the first device's memory figures, by default what JAX may take; None where it does not tell (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def measure(asked: Asked) -> dict[str, Any]:
    """Measures everything on the first device that JAX sees.

    Args:
        asked: what.

    Returns:
        Figures as JSON types: `device`, `asked`, `checks`, `matmul` and `copy` rates, `train`, `scoring`, `decode`,
        `requests`, `matmul_after`, the rate once more at the end, and `memory`.

    Raises:
        AntgmmError: models that do not fit one another, a device that computes wrongly, or too small a memory.
    """
    student, teacher = preset(asked.student), preset(asked.teacher)
    batch = _batch(asked, student)
    planning.check(planning.Asked(student, teacher, len(batch["index"]), batch["input_ids"].shape[1], asked.answer))
    if asked.dtype not in ("bfloat16", "float32"):
        raise AntgmmError(f"--dtype {asked.dtype}: give bfloat16 or float32")
    figures: dict[str, Any] = {"device": device(), "asked": asked._asdict()}
    models = {"student": student, "teacher": teacher}
    say("accelerator: correctness")
    distinct = {name: config for name, config in models.items() if name == "student" or teacher != student}
    checks = {name: correctness(config, _params(config), first(batch, _CHECKED)) for name, config in distinct.items()}
    refuse(checks)
    figures["checks"] = {name: [check._asdict() for check in found] for name, found in checks.items()}
    say("accelerator: rates of matrix products and copies")
    figures["matmul"] = {kind: matmul_rate(kind, asked.matmul, asked.rounds) for kind in PRODUCTS}
    figures["copy"] = copy_rate(asked.copied, asked.rounds)
    rate, copy = figures["matmul"][asked.dtype], figures["copy"]["median"]
    chip = published(figures["device"]["kind"])
    peak = chip.flops if chip is not None and asked.dtype == "bfloat16" else None
    figures["published"] = None if chip is None else {"flops": chip.flops, "bandwidth": chip.bandwidth}
    limits = Limits(rate["median"], peak)
    figures["train"] = _training(asked, models, batch, limits)
    served = {name: Model(config, _params(config, asked.dtype)) for name, config in models.items()}
    largest = first(batch, max(asked.served))
    figures["scoring"] = {name: scoring(model, largest, limits, asked.rounds) for name, model in served.items()}
    figures["decode"] = {
        name: [decoding(model, first(batch, rows), copy, asked.rounds) for rows in asked.served]
        for name, model in served.items()
    }
    figures["requests"] = requests(served, batch, limits, copy, 4 * asked.rounds)
    figures["matmul_after"] = matmul_rate(asked.dtype, [rate["side"]], asked.rounds)
    # JAX keeps one peak for the whole process: the largest of all that was measured.
    figures["memory"] = {"limit": memory("bytes_limit"), "peak": memory("peak_bytes_in_use")}
    return figures


def device() -> dict[str, Any]:
    """The device, its driver, and the libraries that run on it."""
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


def _batch(asked: Asked, config: LMMConfig) -> dict[str, np.ndarray]:
    rows = max(*asked.batches, *asked.served, _CHECKED)
    return random_batch(config, rows, words=asked.words, answer=asked.answer)


def _params(config: LMMConfig, dtype: str = "float32") -> Params:
    """Random parameters; in one program, so that those of another dtype need no second copy."""
    return jax.jit(lambda key: to_dtype(functional(config).init(key), jnp.dtype(dtype)))(jax.random.key(0))


def _training(
    asked: Asked, models: Mapping[str, LMMConfig], batch: Mapping[str, np.ndarray], limits: Limits
) -> dict[str, Any]:
    """A step with each kind of teacher; of a cached one only the head stays on the device."""
    student, teacher = models["student"], models["teacher"]
    sizes, most = sorted(asked.batches), max(asked.batches)
    lesson = partial(Lesson, student, teacher, dtype=jnp.dtype(asked.dtype))
    params = _params(teacher, asked.dtype)
    source = distill.online(functional(teacher), params)
    found = {"online": sweep(lesson(source, True), first(batch, most), sizes, limits, asked.rounds)}
    source = cached_teacher(teacher, params, first(batch, most))
    del params
    gc.collect()  # what an error's traceback or a traced program still holds
    return {"cached": sweep(lesson(source, False), first(batch, most), sizes, limits, asked.rounds), **found}
