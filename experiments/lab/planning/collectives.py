"""Communication of a compiled program, parsed from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.lab.planning.hlo import computations, fused, instructions, shapes

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERAND = re.compile(r" (?:all-gather|all-reduce|collective-permute)-done\(.*?%([\w.-]+)\)")
_STARTS, _ENDS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
# A TPU program repeats an asynchronous collective in the fusions that run beside it.
_BESIDE = "async_collective_fusion"
_SCATTERED = "all-reduce-scatter"
"""Start of the names of the TPU's fusions of an all-reduce and a slice, which send what a reduce-scatter does."""


class Collective(NamedTuple):
    """An exchange that an instruction begins.

    Attributes:
        operation: such as "all-gather".
        group: number of devices that take part.
        size: bytes that each device sends with a ring algorithm: with g devices, an all-gather or reduce-scatter sends
            (g - 1) / g of the whole array, an all-reduce twice that.
        key: what `ended` returns for the instruction that ends it; "" if it ends at once.
    """

    operation: str
    group: int
    size: int
    key: str = ""


def sent(text: str, devices: int) -> Counter[tuple[str, int]]:
    """Returns the bytes that each device sends in one run, by operation and group size.

    Loop bodies are counted by their number of iterations.

    Args:
        text: the compiled program, `jax.stages.Compiled.as_text()`.
        devices: number of devices.

    Returns:
        (operation, group size) -> bytes.
    """
    sizes: Counter[tuple[str, int]] = Counter()
    bodies, _ = computations(text)
    for line, _, times in instructions(text):
        if (each := begun(line, bodies, devices)) is not None:
            sizes[each.operation, each.group] += times * each.size
    return sizes


def begun(line: str, bodies: Mapping[str, Sequence[str]], devices: int) -> Collective | None:
    """Returns the exchange that an instruction begins; None if it begins none.

    Args:
        line: the instruction, which may be a fusion.
        bodies: name -> lines of the computations of its program.
        devices: number of devices.
    """
    if match := _COLLECTIVE.search(line):
        operation, group, started = match[2], _group(line, devices), bool(match[3])
        size = _size(match[1], started=started and operation != "all-reduce")
        return Collective(operation, group, _ring(operation, size, group), _name(line) if started else "")
    name, lines = fused(line, bodies)
    match, channel = _held(lines)
    starts = _holds(lines, _STARTS)
    if match is None or _holds(lines, _ENDS) or (name.startswith(_BESIDE) and not starts):
        return None
    operation, group = match[2], _group(match.string, devices)
    size = _size(match[1], started=False)
    if operation == "all-reduce" and name.startswith(_SCATTERED):
        operation, size = "reduce-scatter", size // group
    return Collective(operation, group, _ring(operation, size, group), channel if starts else "")


def ended(line: str, bodies: Mapping[str, Sequence[str]]) -> str:
    """Returns the key of the exchange that an instruction waits for; "" if it waits for none."""
    if match := _OPERAND.search(line):
        return match[1]
    _, lines = fused(line, bodies)
    return _held(lines)[1] if _holds(lines, _ENDS) else ""


def _held(lines: Sequence[str]) -> tuple[re.Match[str] | None, str]:
    """The collective that a fusion holds, and its channel."""
    match = next((match for line in lines if (match := _COLLECTIVE.search(line))), None)
    channel = _CHANNEL.search(match.string) if match else None
    return match, f"channel {channel[1]}" if channel else ""


def _holds(lines: Sequence[str], text: str) -> bool:
    return any(text in line for line in lines)


def _name(line: str) -> str:
    return line.split(" = ")[0].removeprefix("ROOT").strip(" %")


def _size(text: str, *, started: bool) -> int:
    """Bytes of a result; that of an asynchronous start also has the operands, before, and contexts, behind."""
    parts = [each for each in shapes(text) if not (started and each == ("u32", ()))]
    return sum(each.size for each in parts[len(parts) // 2 if started else 0 :])


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
