"""Energy and carbon emissions of a piece of work, by codecarbon: from hardware counters if available, else estimated.

It uses no network and writes no files. The environment variable CODECARBON_COUNTRY_ISO_CODE (default: `COUNTRY`) sets
the country for the carbon intensity of electricity.
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
"""Country of the paper's service."""

UNATTENDED = 3600.0
"""Seconds between codecarbon's own readings. They are rare, as a concurrent reading would count energy twice."""

# It logs before a tracker can disable it.
logging.getLogger("codecarbon").setLevel(logging.CRITICAL)


@contextmanager
def metered() -> Iterator[Callable[[], Energy]]:
    """Measures the energy of the machine inside the context.

    Yields:
        read(): returns the energy since the start (after the end, the total); thread-safe.

    Raises:
        AntgmmError: the country code is invalid.
    """
    country, grams = _electricity()
    last, lock = _Last(), threading.Lock()
    tracker = OfflineEmissionsTracker(
        # Set everything, because codecarbon's configuration files could enable uploads.
        country_iso_code=country,
        force_carbon_intensity_g_co2e_kwh=grams,
        force_cpu_power=_cpu_watts(),
        tracking_mode="machine",
        measure_power_secs=UNATTENDED,
        output_methods=[],
        output_handlers=[last],
        emissions_endpoint=None,
        allow_multiple_runs=True,  # otherwise it writes a lock file
        pue=1.0,
        log_level="critical",
    )
    tracker.start()

    def read() -> Energy:
        with lock:
            tracker.flush()  # does nothing after the tracker has stopped
            return _energy(last.data, f"{grams:.0f} g CO2 per kWh ({country})")

    try:
        yield read
    finally:
        with lock:
            tracker.stop()


class _Last(BaseOutput):
    """Stores the last figures of a tracker."""

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
    """Assumed power of the CPU at full load, from codecarbon's table of models; None if RAPL counters are available."""
    if is_rapl_available():
        return None
    return count_physical_cpus() * (TDP().tdp or POWER_CONSTANT)


def _electricity() -> tuple[str, float]:
    """Country code, and grams of carbon dioxide equivalent per kWh."""
    country = get_hierarchical_config().get("country_iso_code", COUNTRY).upper()
    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise AntgmmError(
            f"CODECARBON_COUNTRY_ISO_CODE: no country {country!r}: use a three-letter code such as {COUNTRY}"
        )
    return country, known[country]["carbon_intensity"]
