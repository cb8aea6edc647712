"""How long a TPU program takes by the TPU compiler's own estimate."""

import re
from collections import Counter

from experiments.lab.planning.hlo import instructions

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="(?:jit\(\w+\)/)?([^"]*)"')
_WINDOWED = "windowed"


def cycles(text: str) -> Counter[str]:
    """Returns the estimated cycles of a TPU program by source operation.

    The compiler estimates each instruction by itself; those of a loop count once per iteration. Collectives have no
    estimate, so their time is not included.

    Args:
        text: the program compiled for a TPU.

    Returns:
        Operation -> cycles; empty for a program that was compiled for another platform. Operations that the compiler
        split into pieces, to overlap them with a gather, are prefixed by "windowed ".
    """
    counts: Counter[str] = Counter()
    for line, computation, times in instructions(text, fused=False):
        if match := _CYCLES.search(line):
            source = _SOURCE.search(line)
            prefix = f"{_WINDOWED} " if _WINDOWED in computation else ""
            counts[prefix + (source[1] if source else "?")] += times * int(match[1])
    return counts
