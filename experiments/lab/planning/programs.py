"""Programs compiled for devices that need not exist: memory, communication and the compiler's estimate."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax

from experiments.lab.planning import compilers
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.collectives import sent
from experiments.lab.planning.estimate import cycles

_UNOPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 0}


class Program(NamedTuple):
    """What a program needs on each device.

    Attributes:
        temporaries: bytes of intermediate results and of outputs that reuse no input.
        layout: bytes of the program, and of padding of its arguments to the device's tiles.
        sent: (operation, group size) -> bytes; empty if the compiler refuses the program as too large.
        cycles: source operation -> cycles on a TPU (`estimate.cycles`); empty for others.
        refused: whether the compiler refuses the program as too large for the device.
    """

    temporaries: int
    layout: int
    sent: Counter[tuple[str, int]]
    cycles: Counter[str]
    refused: bool = False


def compiled(lowered: jax.stages.Lowered, arguments: Any, chip: str, devices: int) -> Program:
    """Compiles a program and reads its figures; it never runs.

    Args:
        lowered: the program, with shapes on `devices` as arguments.
        arguments: tree of these shapes.
        chip: chip with its own compiler; "" for CPUs.
        devices: number of devices.

    Returns:
        Figures per device.
    """
    kept, program = bytes_of(arguments), _compiled(lowered, chip)
    if isinstance(program, int):
        return Program(max(program - kept, 0), 0, Counter(), Counter(), refused=True)
    analysis, text = program.memory_analysis(), program.as_text() or ""
    assert analysis is not None  # known for all compilers used here
    # Outputs that do not reuse the buffers of donated inputs.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    times = cycles(text, CHIPS[chip], devices) if chip else Counter()
    layout = max(analysis.argument_size_in_bytes - kept, 0) + analysis.generated_code_size_in_bytes
    return Program(analysis.temp_size_in_bytes + fresh, layout, sent(text, devices), times)


def _compiled(lowered: jax.stages.Lowered, chip: str) -> jax.stages.Compiled | int:
    """The compiled program; the bytes that it would need if the compiler refuses it as too large."""
    try:
        # A program for CPUs never runs, so it need not be optimised.
        if not chip:
            return lowered.compile(_UNOPTIMISED)
        with compilers.not_cached():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # "... required for HLO temporaries (83.67G) exceeds available HBM (15.75G)", or "Used 20.13G of 15.75G hbm".
        match = re.search(r"RESOURCE_EXHAUSTED.*?(?:Used |\()([\d.]+)([GM])", str(error), re.DOTALL)
        if match is None:
            raise
        return int(float(match[1]) * {"G": 1 << 30, "M": 1 << 20}[match[2]])


def bytes_of(tree: Any) -> int:
    """Returns the bytes of a tree of shapes on each device.

    Args:
        tree: tree of `jax.ShapeDtypeStruct`; those without sharding are whole on every device.
    """
    return sum(_part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
