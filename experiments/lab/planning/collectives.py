"""Communication of a compiled program, parsed from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


def sent(text: str, devices: int) -> Counter[tuple[str, int]]:
    """Returns the bytes that each device sends in one run, by operation and group size.

    It assumes ring algorithms: with g devices, an all-gather or reduce-scatter sends (g - 1) / g of the whole array, an
    all-reduce twice that. Loop bodies are counted by their number of iterations.

    Args:
        text: the compiled program, `jax.stages.Compiled.as_text()`.
        devices: number of devices.

    Returns:
        (operation, group size) -> bytes.
    """
    bodies, entry = _computations(text)
    sizes: Counter[tuple[str, int]] = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := _COLLECTIVE.search(line):
                group = _group(line, devices)
                sizes[match[2], group] += times * _ring(match[2], _size(match[1]), group)
            trips = _TRIPS.search(line)
            for called in _CALL.findall(line):
                walk(called, times * (int(trips[1]) if trips and " while(" in line else 1))

    walk(entry, 1)
    return sizes


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
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


def _size(shape: str) -> int:
    return sum(_BYTES.get(kind, 4) * math.prod(_numbers(dims)) for kind, dims in _SHAPE.findall(shape))


def _numbers(text: str) -> Iterator[int]:
    return (int(number) for number in text.split(",") if number)


def _group(line: str, devices: int) -> int:
    """Group size from `[4,16]<=[64]`, from `mesh['a'=16,'b'=4], ... {'a'}` or from `{{0,1},{2,3}}`."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=@?mesh\S*?\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(list(_numbers(match[1])))
    return devices


def _ring(operation: str, size: int, group: int) -> int:
    """Bytes that a device sends, from the size of the result (for a reduce-scatter, of one part)."""
    if operation == "collective-permute":
        return size
    if operation == "reduce-scatter":
        return size * (group - 1)
    return (2 if operation == "all-reduce" else 1) * size * (group - 1) // group
