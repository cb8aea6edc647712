"""Energy and carbon of a piece of work, through codecarbon: counters where the machine has them, else stated power.

Nothing is asked of the network and no file is written. The country whose electricity is assumed is codecarbon's own
setting, the environment variable CODECARBON_COUNTRY_ISO_CODE; `COUNTRY` where it is not set.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from codecarbon import OfflineEmissionsTracker
from codecarbon.core.config import get_hierarchical_config
from codecarbon.core.cpu import TDP, is_rapl_available
from codecarbon.core.util import count_physical_cpus
from codecarbon.external.hardware import POWER_CONSTANT
from codecarbon.input import DataSource
from codecarbon.output_methods.base_output import BaseOutput
from codecarbon.output_methods.emissions_data import EmissionsData

from antgmm_jax.errors import AntgmmError
from experiments.run.host.energy import JOULES_A_KWH, Energy

COUNTRY = "CHN"
"""Where the paper's service stands."""

UNATTENDED = 3600.0
"""Seconds after which codecarbon reads by itself: two readings at once count a while twice, so it hardly ever does."""

# It speaks before a tracker can be told not to.
logging.getLogger("codecarbon").setLevel(logging.CRITICAL)


@contextmanager
def metered() -> Iterator[Callable[[], Energy]]:
    """Counts the energy that the machine uses inside.

    Yields:
        read(), from any thread: the energy since the start; after the end, the whole.

    Raises:
        AntgmmError: the country that is set is none.
    """
    country, grams = _electricity()
    last, lock = _Last(), threading.Lock()
    tracker = OfflineEmissionsTracker(
        # All is said here, for codecarbon's configuration files and environment could send figures somewhere.
        country_iso_code=country,
        force_carbon_intensity_g_co2e_kwh=grams,
        force_cpu_power=_cpu_watts(),
        tracking_mode="machine",
        measure_power_secs=UNATTENDED,
        output_methods=[],
        output_handlers=[last],
        emissions_endpoint=None,
        allow_multiple_runs=True,  # else it writes a lock file
        pue=1.0,
        log_level="critical",
    )
    tracker.start()

    def read() -> Energy:
        with lock:
            tracker.flush()  # does nothing once it has stopped
            return _energy(last.data, f"{grams:.0f} g CO2 a kWh ({country})")

    try:
        yield read
    finally:
        with lock:
            tracker.stop()


class _Last(BaseOutput):
    """Keeps the newest figures of a tracker."""

    data: EmissionsData

    def out(self, total: EmissionsData, delta: EmissionsData) -> None:
        self.data = total


def _energy(data: EmissionsData, carbon: str) -> Energy:
    assumed, gpus = _cpu_watts(), data.gpu_count or 0

    def watts(kwh: float) -> float:
        return kwh * JOULES_A_KWH / data.duration

    return Energy(
        kwh=data.energy_consumed,
        kg_co2=data.emissions,
        seconds=data.duration,
        source="measured" if assumed is None or gpus else "estimated",
        cpu_watts=watts(data.cpu_energy),
        gpu_watts=watts(data.gpu_energy),
        ram_watts=watts(data.ram_energy),
        assumes=[
            "CPU read from RAPL counters"
            if assumed is None
            else f"CPU of {os.cpu_count()} cores at {0.1 * assumed:.3g} W idle to {assumed:.3g} W at full load",
            *([f"counters of {gpus} GPUs"] if gpus else []),
            f"memory at {data.ram_power:.3g} W",
            carbon,
        ],
    )


@cache
def _cpu_watts() -> float | None:
    """Power that is assumed of the CPU at full load, by what codecarbon knows of its model; None where RAPL is read."""
    if is_rapl_available():
        return None
    return count_physical_cpus() * (TDP().tdp or POWER_CONSTANT)


def _electricity() -> tuple[str, float]:
    """Country code, and grams of carbon dioxide equivalent of a kWh there."""
    country = get_hierarchical_config().get("country_iso_code", COUNTRY).upper()
    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise AntgmmError(
            f"CODECARBON_COUNTRY_ISO_CODE: no country {country!r}: set its three letters, as in {COUNTRY}"
        )
    return country, known[country]["carbon_intensity"]
