"""Communication of a compiled program, parsed from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from experiments.lab.planning.hlo import instructions

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
# A TPU program repeats an asynchronous collective in the fusions that run beside it, and in the one that ends it.
_REPEATED = re.compile(r"^async_collective_fusion")
_SCATTERED = "all-reduce-scatter"
"""Start of the names of the TPU's fusions of an all-reduce and a slice, which send what a reduce-scatter does."""


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
    sizes: Counter[tuple[str, int]] = Counter()
    ended = _ended(text)
    for line, computation, times in instructions(text, fused=True):
        match = _COLLECTIVE.search(line)
        if match is None or computation in ended or _REPEATED.match(computation):
            continue
        operation, group = match[2], _group(line, devices)
        size = _size(match[1], started=bool(match[3]) and operation != "all-reduce")
        if operation == "all-reduce" and computation.startswith(_SCATTERED):
            operation, size = "reduce-scatter", size // group
        sizes[operation, group] += times * _ring(operation, size, group)
    return sizes


def _ended(text: str) -> set[str]:
    """Names of the computations that end an asynchronous collective in a TPU program."""
    heads = re.finditer(r"^%?([\w.-]+) \(.*\{\n((?:  .*\n)*)", text, re.MULTILINE)
    return {head[1] for head in heads if '"AsyncCollectiveDone"' in head[2]}


def _size(shape: str, *, started: bool) -> int:
    """Bytes of a result; that of an asynchronous start also has the operands, before, and contexts, behind."""
    parts = [(kind, dims) for kind, dims in _SHAPE.findall(shape) if not (started and (kind, dims) == ("u32", ""))]
    return sum(
        _BYTES.get(kind, 4) * math.prod(_numbers(dims)) for kind, dims in parts[len(parts) // 2 if started else 0 :]
    )


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
