"""Energy and carbon of pieces of work, and their sums; `experiments.run.host.metering` measures them."""

from collections.abc import Sequence
from typing import NamedTuple

JOULES_A_KWH = 3.6e6


class Energy(NamedTuple):
    """What the whole machine used while a piece of work ran, idle power and other work included.

    Attributes:
        kwh: energy.
        kg_co2: carbon dioxide equivalent of it, in the country's electricity.
        seconds: how long it took.
        source: "measured" where counters of CPU or GPU were read, "estimated" where all power is assumed.
        cpu_watts: mean power of the CPU.
        gpu_watts: of GPUs.
        ram_watts: of memory.
        assumes: what was read and what is assumed, a sentence's part each.
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
    """Several pieces of work as one.

    Args:
        parts: at least one; they did not run at the same time.

    Returns:
        Sums; mean power by time; "measured" where all are.
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
