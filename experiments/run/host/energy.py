"""Energy and carbon emissions of pieces of work; `experiments.run.host.metering` measures them."""

from collections.abc import Sequence
from typing import NamedTuple

JOULES_A_KWH = 3.6e6


class Energy(NamedTuple):
    """Energy of the whole machine during a piece of work, including idle power and other work.

    Attributes:
        kwh: energy in kWh.
        kg_co2: carbon dioxide equivalent in kg.
        seconds: duration.
        source: "measured" if counters of CPU or GPU were read, "estimated" if all power is assumed.
        cpu_watts: mean power of the CPU.
        gpu_watts: mean power of GPUs.
        ram_watts: mean power of memory.
        assumes: descriptions of the measurements and assumptions.
    """

    kwh: float
    kg_co2: float
    seconds: float
    source: str
    cpu_watts: float
    gpu_watts: float
    ram_watts: float
    assumes: Sequence[str]


def total(parts: Sequence[Energy]) -> Energy:
    """Adds the energy of several pieces of work.

    Args:
        parts: at least one; they must not overlap in time.

    Returns:
        Sums, and mean power; "measured" if all parts are.
    """
    seconds = sum(part.seconds for part in parts)

    def mean(watts: Sequence[float]) -> float:
        return sum(w * part.seconds for w, part in zip(watts, parts, strict=True)) / seconds

    return Energy(
        kwh=sum(part.kwh for part in parts),
        kg_co2=sum(part.kg_co2 for part in parts),
        seconds=seconds,
        source="measured" if all(part.source == "measured" for part in parts) else "estimated",
        cpu_watts=mean([part.cpu_watts for part in parts]),
        gpu_watts=mean([part.gpu_watts for part in parts]),
        ram_watts=mean([part.ram_watts for part in parts]),
        assumes=list(dict.fromkeys(line for part in parts for line in part.assumes)),
    )
