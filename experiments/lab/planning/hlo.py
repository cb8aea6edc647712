"""Optimised programs as text (`jax.stages.Compiled.as_text()`): computations, and the iterations of their loops."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY, _CONDITION = re.compile(r"body=%?([\w.-]+)"), re.compile(r"condition=%?([\w.-]+)")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.-]+)")
_CONSTANT = re.compile(r" s32\[\]\S* constant\((\d+)\)")


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


def instructions(text: str, *, fused: bool) -> Iterator[Instruction]:
    """Iterates over the instructions of a program, with those of loops and called computations.

    Args:
        text: the program.
        fused: whether to include the instructions inside fusions.

    Yields:
        Instructions. A computation that is called from several places is repeated.
    """
    bodies, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        for line in bodies.get(name, ()):
            yield Instruction(line, name, times)
            if " while(" in line and (body := _BODY.search(line)):
                yield from walk(body[1], times * _trips(line, bodies))
            elif fused or " call(" in line or " async-start(" in line:
                for called in _CALLED.findall(line):
                    yield from walk(called, times)

    return walk(entry, 1)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of every computation, and the name of the first to run."""
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


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Iterations of a loop: annotated by the CPU's and the CUDA compiler, in the condition of the TPU's."""
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    return max((int(number) for each in lines for number in _CONSTANT.findall(each)), default=1)
