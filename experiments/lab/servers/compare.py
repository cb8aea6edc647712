"""Compares pruned exports in JAX, transformers and vLLM."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.loading import load_processor
from experiments.lab.servers.exports import PAD, conversations, expected, presets, pruned_export
from experiments.run.host.console import say

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".cache" / "vllm-venv" / "bin" / "python"
"""Interpreter of vLLM's environment, created by `make vllm-env`."""
HEAD = ("model", "token ids", "pixels", "transformers", "vLLM")


def run(folder: Path, python: Path, *, names: Sequence[str] = (), tokens: int = 8) -> dict[str, Any]:
    """Exports a pruned model of each family, and compares its answers.

    Args:
        folder: folder for exports and images.
        python: interpreter with vLLM.
        names: presets; empty for all small ones.
        tokens: length of the answers.

    Returns:
        preset -> figures of `compared`, or `not_served`, vLLM's last error.

    Raises:
        AntgmmError: no such interpreter or preset.
    """
    if not python.exists():
        raise AntgmmError(f"{python} does not exist: run `make vllm-env`, or name vLLM's Python with --python")
    if unknown := sorted({*names} - {*presets()}):
        raise AntgmmError(f"unknown preset {unknown[0]!r}: use one of {', '.join(presets())}")
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in names or presets():
        say(f"servers: {name}")
        results[name] = _one(name, folder, python, tokens)
    return results


def _one(name: str, folder: Path, python: Path, tokens: int) -> dict[str, Any]:
    export = pruned_export(name, folder)
    processor: Any = load_processor(export.directory)
    chats = conversations(folder, processor)
    ours = expected(export, chats, tokens)
    requests, answers = folder / f"{name}.requests.json", folder / f"{name}.answers.json"
    texts, template = [one["text"] for one in ours], bool(processor.chat_template)
    request = {"conversations": chats, "texts": texts, "template": template, "tokens": tokens}
    longest = export.config.language.learned_positions or 2048
    requests.write_text(json.dumps({**request, "length": longest}, indent=1))
    answers.unlink(missing_ok=True)
    script = Path(__file__).with_name("vllm_answers.py")
    done = subprocess.run([python, script, export.directory, requests, answers], capture_output=True, text=True)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return {"not_served": re.findall(r"Error: (.+)", done.stderr)[-1:] or ["see its log"]}
    return compared(ours, json.loads(answers.read_text()))


def compared(ours: Sequence[Mapping[str, Any]], served: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compares our conversations with a server's.

    Args:
        ours: from `expected`.
        served: for each conversation its `ids`, `pixels` (arrays in lists, one for each image or patch) and `answer`,
            without padding.

    Returns:
        `conversations`, and how many have equal `ids`, equal answers in `torch` and in `vllm`; `pixels`, the largest
        difference of images of equal size without padding; `unequal`, the number of images of unequal size.
    """
    pairs = [*zip(ours, served, strict=True)]
    pixels = [_pixels(one["pixels"], other["pixels"]) for one, other in pairs]
    return {
        "conversations": len(pairs),
        "ids": sum(one["ids"] == other["ids"] for one, other in pairs),
        "pixels": max(difference for difference, _ in pixels),
        "unequal": sum(unequal for _, unequal in pixels),
        "torch": sum(one["jax"] == one["torch"] for one in ours),
        "vllm": sum(one["jax"] == _padded(other["answer"], len(one["jax"])) for one, other in pairs),
    }


def _pixels(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, int]:
    """The largest difference of a conversation's images of equal size, and the number of the others."""
    flat = [np.concatenate([np.zeros(0), *map(np.ravel, images)]) for images in (ours, theirs)]
    if flat[0].size == flat[1].size:
        return float(np.abs(flat[0] - flat[1]).max(initial=0)), 0
    differences = [_difference(np.asarray(one), np.asarray(other)) for one, other in zip(ours, theirs, strict=True)]
    comparable = [difference for difference in differences if difference is not None]
    return max(comparable, default=0.0), len(differences) - len(comparable)


def _difference(one: np.ndarray, other: np.ndarray) -> float | None:
    """The largest difference of two arrays of an image without padding, None if one is larger than the other."""
    common = tuple(slice(min(lengths)) for lengths in zip(one.shape, other.shape, strict=True))
    if any(np.count_nonzero(array) > np.count_nonzero(array[common]) for array in (one, other)):
        return None
    return float(np.abs(one[common] - other[common]).max())


def _padded(answer: Sequence[int], length: int) -> list[int]:
    return [*answer, *[PAD] * (length - len(answer))]


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the lines of the table with `HEAD`: equal token ids and answers, and the largest difference of pixels."""
    lines = []
    for name, one in results.items():
        if "not_served" in one:
            lines.append((name, "-", "-", "-", f"not served: {one['not_served'][0][:80]}"))
            continue
        count, pixels = one["conversations"], f"{one['pixels']:.1g}"
        if one["unequal"]:
            pixels += f", {one['unequal']} images of unequal size"
        ids, torch, vllm = (f"{one[key]} of {count}" for key in ("ids", "torch", "vllm"))
        lines.append((name, ids, pixels, torch, vllm))
    return lines
