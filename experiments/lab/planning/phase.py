"""What is planned of a run, and for which devices."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.step import StepSpec
from experiments.run.narrow import Narrow


class Load(NamedTuple):
    """Where and on which rows a run is planned.

    Attributes:
        mesh: mesh axis -> devices.
        chip: chip to compile for, with its own compiler; "" for CPUs.
        length: prompt tokens per row, including image tokens.
        answer: answer tokens per row.
        memory: bytes of a device, from which a run chooses some of its batches.
        narrow: parameters of the initial model that are stored in two bytes.
        slots: image slots per row; None for those of one image of the usual size.
    """

    mesh: Mapping[str, int]
    chip: str
    length: int
    answer: int
    memory: float = math.inf
    narrow: Narrow = MappingProxyType({})
    slots: int | None = None

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())


class Phase(NamedTuple):
    """A phase of a run.

    Attributes:
        name: name, with its stage.
        memory: kind -> bytes on each device; those of `temporaries` do not stay.
        host: bytes of the memory of a machine, beyond the program: copies of arrays, and rows of batches made ahead.
        disk: bytes written that stay.
        sent: bytes that each device sends in the whole phase.
        flops: FLOPs of a device in the whole phase.
        spec: the step, for a phase that trains.
        compiled: whether memory is that of a compiled program; else it is arithmetic.
    """

    name: str
    memory: dict[str, int]
    host: int = 0
    disk: int = 0
    sent: int = 0
    flops: float = 0.0
    spec: StepSpec | None = None
    compiled: bool = False

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.memory.values())

    def least(self, chip: str, devices: int) -> float:
        """Lower bound of the seconds: products at the peak rate, and what is sent at the rate of the links.

        Args:
            chip: a key of `CHIPS`.
            devices: number of devices; more than an island has send over the network.
        """
        spec = CHIPS[chip]
        return max(self.flops / spec.flops, self.sent / spec.rate(devices))
