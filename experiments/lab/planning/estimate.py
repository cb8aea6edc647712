"""How long a TPU program takes: its compiler's estimate, with the kernels and waits that the compiler leaves out."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.lab.planning.chips import Chip
from experiments.lab.planning.collectives import Collective, begun, ended
from experiments.lab.planning.hlo import computations, runs
from experiments.lab.planning.kernels import kernel

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="(?:jit\(\w+\)/)?([^"]*)"')
_WINDOWED = "windowed"
LINKS = "links "
"""Prefix of the cycles in which a program waits for its links."""


def cycles(text: str, chip: Chip, devices: int) -> Counter[str]:
    """Returns the cycles of a TPU program by source operation; their sum is its time.

    The compiler estimates each instruction by itself, but no kernels and no collectives. Kernels get their lower bound.
    The links carry one collective at a time, at their published rate; the program waits for those that end later than
    what the compiler put beside them. Loops count once per iteration.

    Args:
        text: the program compiled for a TPU.
        chip: the chip.
        devices: number of devices.

    Returns:
        Operation -> cycles; empty for a program that was compiled for another platform. Operations that the compiler
        split into pieces, to overlap them with a gather, are prefixed by "windowed ", kernels by "kernel ", and waits
        by "links ".
    """
    if not _CYCLES.search(text):
        return Counter()
    bodies, entry = computations(text)
    return _run(entry, bodies, chip, devices)


def _run(name: str, bodies: Mapping[str, Sequence[str]], chip: Chip, devices: int) -> Counter[str]:
    """Cycles of a computation that begins with idle links."""
    links = _Links(chip.rate(devices) / chip.clock)
    for line in bodies.get(name, ()):
        for part, times in runs(line, bodies):
            links.spent.update({source: times * n for source, n in _run(part, bodies, chip, devices).items()})
        if match := _CYCLES.search(line):
            source = _SOURCE.search(line)
            prefix = f"{_WINDOWED} " if _WINDOWED in name else ""
            links.spent[prefix + (source[1] if source else "?")] += int(match[1])
        elif one := kernel(line):
            links.spent[f"kernel {one.name}"] += round(chip.clock * one.seconds(chip))
        if collective := begun(line, bodies, devices):
            links.send(collective)
        if key := ended(line, bodies):
            links.wait(key)
    return links.spent


class _Links:
    """The clock of a computation, and what its links still carry."""

    def __init__(self, rate: float):
        """`rate` is in bytes per cycle."""
        self.rate, self.free = rate, 0.0
        self.spent: Counter[str] = Counter()
        self._ends: dict[str, tuple[str, float]] = {}

    def send(self, each: Collective) -> None:
        """Sends after what was sent before; waits for it if nothing else ends it."""
        self.free = max(self.free, self.spent.total()) + each.size / self.rate
        self._ends[each.key] = each.operation, self.free
        if not each.key:
            self.wait("")

    def wait(self, key: str) -> None:
        """Waits for the end of a collective."""
        operation, end = self._ends.pop(key)
        self.spent[f"{LINKS}{operation}"] += max(round(end) - self.spent.total(), 0)
