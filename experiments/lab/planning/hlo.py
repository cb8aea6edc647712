"""Optimised programs as text (`jax.stages.Compiled.as_text()`): computations, and the iterations of their loops."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY, _CONDITION = re.compile(r"body=%?([\w.-]+)"), re.compile(r"condition=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:(?:true|false)_computation=|branch_computations=\{)([^},]+(?:, ?%[^},]+)*)")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.-]+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_CONSTANT = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")


class Shape(NamedTuple):
    """Type of an array: its dtype, as programs write it, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return _BYTES.get(self.dtype, 4) * math.prod(self.dims)


class Instruction(NamedTuple):
    """An instruction of a program.

    Attributes:
        line: its text.
        computation: name of the computation that holds it.
        times: number of runs of it in one run of the program.
    """

    line: str
    computation: str
    times: int


def instructions(text: str) -> Iterator[Instruction]:
    """Iterates over the instructions of a program, with those of loops and called computations, not of fusions.

    Args:
        text: the program.

    Yields:
        Instructions. A computation that is called from several places is repeated.
    """
    bodies, entry = computations(text)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        for line in bodies.get(name, ()):
            yield Instruction(line, name, times)
            for part, more in runs(line, bodies):
                yield from walk(part, times * more)

    return walk(entry, 1)


def runs(line: str, bodies: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """Returns the computations that a loop or a call runs, and the number of times; none for other instructions.

    Each branch of a conditional counts once, as if all were taken: which one is taken, the program does not say.
    """
    if " conditional(" in line:
        return [(name.strip(" %"), 1) for group in _BRANCHES.findall(line) for name in group.split(",")]
    if " while(" in line and (body := _BODY.search(line)):
        return [(body[1], _trips(line, bodies))]
    return [(name, 1) for name in _CALLED.findall(line)] if " call(" in line or " async-start(" in line else []


def fused(line: str, bodies: Mapping[str, Sequence[str]]) -> tuple[str, Sequence[str]]:
    """Returns the name and the lines of the computation that a fusion is made of; "" and none for others."""
    match = _CALLED.search(line) if " fusion(" in line else None
    return (match[1], bodies.get(match[1], ())) if match else ("", ())


def shapes(text: str) -> list[Shape]:
    """Returns the types of arrays in a text, in order."""
    return [
        Shape(dtype, tuple(int(number) for number in dims.split(",") if number)) for dtype, dims in _SHAPE.findall(text)
    ]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns name -> lines of every computation of a program, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _HEAD.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trips(line: str, bodies: Mapping[str, Sequence[str]]) -> int:
    """Iterations of a loop: annotated by the CPU's and the CUDA compiler, in the condition of the TPU's."""
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    return max((int(number) for each in lines for number in _CONSTANT.findall(each)), default=1)
