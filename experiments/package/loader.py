"""Answers from a .stablehlo package in JAX.

This file needs jax, flatbuffers, numpy and safetensors, and nothing of this project: copy it to where you serve.
"""

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors import SafetensorError, safe_open

PROGRAM, WEIGHTS = "program/", "weights/"
"""Prefixes of the names in the file, which is a safetensors file: programs are bytes, weights are arrays."""
CHECKSUMS, ABOUT = "crc32", ""
"""Metadata: JSON of name -> `checksum`, and the name there of `checksum_of` the other metadata."""


class Package:
    """Answers requests by the smallest program of a file that holds them.

    Args:
        file: .stablehlo file.

    Attributes:
        about: texts: `tokens` (most tokens of an answer), `eos`, `pad`, `image_token`, `image_tokens` (of an image),
            `side` (of padding), `jax` (its version).
        programs: (rows, width) -> its shapes of inputs, and the compiled program (weights, inputs) -> answers.

    Raises:
        ValueError: the file is damaged, or its programs need another version of JAX; one line.
    """

    def __init__(self, file: str | Path):
        self.file = file
        self.about, arrays = _read(file)
        programs = {name: arrays.pop(name) for name in sorted(arrays) if name.startswith(PROGRAM)}
        self.programs: dict[tuple[int, int], tuple[Mapping[str, Any], Any]] = {}
        for values in programs.values():
            try:
                program = export.deserialize(bytearray(values.tobytes()))
                (kinds, inputs), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
            except Exception as error:
                made = f"this is {jax.__version__}, it was written by {self.about.get('jax', 'an unknown one')}"
                raise ValueError(f"{file} cannot be read by this version of JAX ({made}): package it again") from error
            self.programs[inputs["input_ids"].shape] = inputs, jax.jit(program.call)
        if not self.programs:
            raise ValueError(f"{file} holds no program: package it again")
        # Stored in the dtype of the checkpoint, computed in that of the programs.
        self._weights = {
            name: jax.device_put(arrays[WEIGHTS + name].astype(kind.dtype)) for name, kind in kinds.items()
        }

    def __call__(self, request: Mapping[str, Any]) -> np.ndarray:
        """Greedy answers.

        Args:
            request: outputs of the processor for some rows: `input_ids` and `attention_mask` [B, L], `pixel_values`;
                more entries are ignored.

        Returns:
            Token ids int32 [B, N], padded after the end of each answer.

        Raises:
            ValueError: no program is large enough, or an input is missing.
        """
        rows, width = np.shape(request["input_ids"])
        large = [shape for shape in self.programs if rows <= shape[0] and width <= shape[1]]
        if not large:
            has = ", ".join(f"{a} x {b}" for a, b in self.programs)
            remedy = f"package it with --batch {rows} --width {width}"
            raise ValueError(f"{self.file} has no program for {rows} x {width} tokens, only for {has}: {remedy}")
        images = self._images(request)
        roomy = [shape for shape in large if images <= _slots(shape, self.programs[shape][0])]
        if not roomy:
            most = max(_slots(shape, self.programs[shape][0]) for shape in large)
            raise ValueError(
                f"{self.file} takes {most} images in a row, the request has {images}: package it with such"
            )
        inputs, program = self.programs[min(roomy, key=lambda shape: shape[0] * shape[1])]
        if "pixel_values" in inputs and int(self.about["image_token"]) not in np.asarray(request["input_ids"]):
            request = {"pixel_values": np.zeros(inputs["pixel_values"].shape, np.float32), **request}
        fit = partial(_fit, left=self.about["side"] == "left")
        fitted = {name: fit(name, request, kind.shape).astype(kind.dtype) for name, kind in inputs.items()}
        return np.asarray(program(self._weights, fitted))[:rows]

    def _images(self, request: Mapping[str, Any]) -> int:
        """Most images of a row, by the places of their tokens."""
        places = np.asarray(request["input_ids"]) == int(self.about["image_token"])
        counts = (places & (np.asarray(request.get("attention_mask", 1)) > 0)).sum(axis=1)
        return int(counts.max()) // int(self.about["image_tokens"])


def _slots(shape: tuple[int, int], inputs: Mapping[str, Any]) -> int:
    """Images of a row that a program of some rows and width has room for."""
    sizes = inputs["pixel_values"].shape if "pixel_values" in inputs else (0,)
    return sizes[1] if len(sizes) == 5 else sizes[0] // shape[0]


def _read(file: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a file, after comparing their checksums."""
    try:
        with safe_open(file, "numpy") as handle:
            about, arrays = handle.metadata() or {}, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        sums = dict(json.loads(about.pop(CHECKSUMS)))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no package, or damaged ({error}): package it again") from error
    if sums.pop(ABOUT, None) != checksum_of(about):
        raise ValueError(f"{file} is damaged at its metadata: package it again")
    for name in sorted(sums.keys() | arrays.keys()):
        if name not in arrays or checksum(arrays[name]) != sums.get(name):
            raise ValueError(f"{file} is damaged at {name}: package it again")
    return about, arrays


def checksum_of(about: Mapping[str, str]) -> int:
    """CRC-32 of metadata."""
    return zlib.crc32(json.dumps(sorted(about.items())).encode())


def checksum(values: np.ndarray) -> int:
    """CRC-32 of an array's dtype, shape and values."""
    kind = zlib.crc32(f"{values.dtype} {values.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, kind)


def _fit(name: str, request: Mapping[str, Any], shape: tuple[int, ...], *, left: bool) -> np.ndarray:
    """An input in the shape of a program: tokens of padding are 0, rows and image slots repeat the last one."""
    if name not in request:
        raise ValueError(f"the request has no {name}: the processor makes it of text and images")
    values = np.asarray(request[name])
    more = [size - have for size, have in zip(shape, values.shape, strict=False)]
    if values.ndim != len(shape) or min(more) < 0 or 0 in values.shape:
        raise ValueError(f"{name} has the shape {values.shape}, the program takes {shape}: package a larger one")
    if name != "pixel_values":
        values = np.pad(values, ((0, 0), (more[1], 0) if left else (0, more[1])))
        more[1] = 0
    return np.pad(values, [(0, count) for count in more], mode="edge")
