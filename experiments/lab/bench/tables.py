"""Tables of the benchmark of one device."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.run.host.console import table

AIM = 0.5


def shown(figures: Mapping[str, Any]) -> Iterator[Any]:
    """Formats the figures of one device as texts and tables.

    Args:
        figures: result of `accelerator.measure`.

    Yields:
        Texts and tables.
    """
    device, settings = figures["device"], figures["settings"]
    driver = f", {device['driver']}" if device["driver"] else ""
    yield (
        f"{device['kind']} ({device['platform']}), jax {device['jax']}, jaxlib {device['jaxlib']}{driver}; host"
        f" {device['host']['cpu']}, {device['host']['cores']} cores, load {device['host']['load']}"
    )
    yield (
        f"student {settings['student']}, teacher {settings['teacher']}, computed in {settings['dtype']}; prompts of"
        f" {settings['words']} tokens and the image, answers of {settings['answer']} tokens;"
        f" medians (quartiles) of {settings['rounds']} rounds"
    )
    rows = [
        (model, check["name"], check["against"], f"{check['error']:.1e}", f"{check['allowed']:.0e}")
        for model, results in figures["checks"].items()
        for check in results
    ]
    yield table(["model", "computed", "against", "difference", "allowed"], rows, "Correctness: logits")
    yield table(["rate", "measured", "best with"], list(_rates(figures)), "Measured rates of the device")
    for source, results in figures["train"].items():
        yield _train(source, results, settings)
    title = "Scoring and decoding (weights that fit into a cache can exceed the copy rate)"
    yield table(["", "batch", "rate", "share", "of"], list(_served(figures)), title)
    rows = [
        (f"{model}, {phase}", _cell(each["ms"]), f"{each['roofline']:.2f}")
        for model, phases in figures["requests"].items()
        for phase, each in phases.items()
    ]
    yield table(["request", "ms", "roofline / time"], rows, f"Requests at batch 1, {settings['answer']} tokens")
    if figures["memory"]["peak"] is not None:
        yield f"peak memory {_bytes(figures['memory']['peak'])} of {_bytes(figures['memory']['limit'])}"


def _rates(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    published = figures["published"] or {}
    for kind, rate in figures["matmul"].items():
        yield f"matmul {kind}, TFLOP/s", _cell(rate, 1e12), f"side {rate['side']}"
    after = figures["matmul_after"]
    yield f"matmul {figures['settings']['dtype']} again at the end", _cell(after, 1e12), f"side {after['side']}"
    yield "copy, GB/s", _cell(figures["copy"], 1e9), figures["copy"]["kernel"]
    if published:
        yield "published bfloat16, TFLOP/s", f"{published['flops'] / 1e12:.0f}", ""
        yield "published memory, GB/s", f"{published['bandwidth'] / 1e9:.0f}", ""


def _train(source: str, results: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    rows = []
    for each in results["sizes"]:
        published, best = each["mfu_published"], each["batch"] == results["best"]["batch"]
        rows.append(
            (
                f"{each['batch']}{' (best)' if best else ''}",
                _cell(each["ms"]),
                _number(each["samples_per_second"]["median"]),
                _cell(each["mfu"]),
                "" if published is None else _cell(published),
                f"{each['flops']['traced'] / each['flops']['needed']:.2f}",
                "" if each["program_bytes"] is None else _bytes(each["program_bytes"]),
            )
        )
    if results["full_at"] is not None:
        rows.append((f"{results['full_at']}: memory full", *[""] * 6))
    head = ["batch", "ms", "samples/s", "MFU", "of published", "FLOPs / needed", "memory"]
    title = (
        f"Train step, teacher {source}, {settings['dtype']}: MFU of the measured matmul rate (aim {AIM} in bfloat16)"
    )
    return table(head, rows, title)


def _served(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for model, each in figures["scoring"].items():
        rate = f"{_cell(each['samples_per_second'])} samples/s"
        yield f"{model}, scoring", str(each["batch"]), rate, _cell(each["mfu"]), "matmul rate"
    for model, sizes in figures["decode"].items():
        for each in sizes:
            rate = f"{_cell(each['tokens_per_second'])} tokens/s"
            yield f"{model}, decode", str(each["batch"]), rate, _cell(each["copy_share"]), "copy rate"


def _cell(value: Mapping[str, float], unit: float = 1.0) -> str:
    median, low, high = (_number(value[name] / unit) for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def _number(value: float) -> str:
    """Formats a number with three significant digits, without exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
