"""Energy: measured and assumed parts, sums by hand, no network access, no files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from codecarbon.input import DataSource

from antgmm_jax.errors import AntgmmError
from experiments.run.host import metering
from experiments.run.host.energy import Energy, total
from experiments.run.host.metering import metered

ROOT = Path(__file__).resolve().parents[4]
COUNTED = """
import json, os, socket, time

def blocked(*_, **__):
    os.write(2, b"a connection was opened")
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = blocked
from experiments.run.host.metering import metered
with metered() as read:
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        pass
    middle = read()
print(json.dumps([middle._asdict(), read()._asdict(), read()._asdict()]))
"""
# Settings that a user may have for other work.
SETTINGS = {
    "EMISSIONS_ENDPOINT": "http://127.0.0.1:9/x",
    "OUTPUT_METHODS": "csv,api,logger,prometheus",
    "SAVE_TO_API": "true",
    "CO2_SIGNAL_API_TOKEN": "token",
    "ALLOW_MULTIPLE_RUNS": "false",
    "LOG_LEVEL": "debug",
    "PUE": "3.0",
    "COUNTRY_ISO_CODE": "FRA",
}


def has_counters() -> bool:
    """Whether this process can read the energy counters of the CPU, or the machine has a GPU with a driver."""
    zones = Path("/sys/class/powercap").glob("intel-rapl*:*")
    return any(os.access(zone / "energy_uj", os.R_OK) for zone in zones) or Path("/proc/driver/nvidia/gpus").exists()


def test_a_second_of_work_is_metered_without_network_or_files(tmp_path):
    settings = {f"CODECARBON_{name}": value for name, value in SETTINGS.items()}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COUNTED],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    middle, used, again = json.loads(done.stdout)
    assert used == again and middle["kwh"] <= used["kwh"] and middle["seconds"] < used["seconds"]
    assert used["source"] == ("measured" if has_counters() else "estimated")
    assert used["seconds"] >= 1.0 and used["kwh"] > 0
    watts = used["cpu_watts"] + used["gpu_watts"] + used["ram_watts"]
    assert used["kwh"] == pytest.approx(watts * used["seconds"] / 3.6e6)
    france = DataSource().get_global_energy_mix_data()["FRA"]["carbon_intensity"]
    assert used["kg_co2"] == pytest.approx(used["kwh"] * france / 1000)
    assert used["assumes"][-1] == f"{france:.0f} g CO2 per kWh (FRA)"
    assumption = re.match(r"CPU of (\d+) cores at ([\d.]+) W idle to ([\d.]+) W at full load", used["assumes"][0])
    if assumption:
        assert int(assumption[1]) == os.cpu_count() and float(assumption[2]) == pytest.approx(float(assumption[3]) / 10)
        assert 0 < used["cpu_watts"] <= float(assumption[3])
    else:
        assert used["assumes"][0] == "CPU read from RAPL counters"


@pytest.mark.parametrize(
    ("assumed", "gpus", "source", "assumes"),
    [
        (8.0, 0, "estimated", ["CPU of 2 cores at 0.8 W idle to 8 W at full load", "memory at 20 W"]),
        (
            8.0,
            1,
            "measured",
            ["CPU of 2 cores at 0.8 W idle to 8 W at full load", "counters of 1 GPUs", "memory at 20 W"],
        ),
        (None, 0, "measured", ["CPU read from RAPL counters", "memory at 20 W"]),
    ],
)
def test_the_source_says_whether_counters_were_read(monkeypatch, assumed, gpus, source, assumes):
    monkeypatch.setattr(metering, "_cpu_watts", lambda: assumed)
    monkeypatch.setattr(metering.os, "cpu_count", lambda: 2)
    parts = {"cpu_energy": 0.001, "gpu_energy": 0.01 * gpus, "ram_energy": 0.002}
    data = SimpleNamespace(
        **parts, duration=1800.0, gpu_count=gpus, ram_power=20.0, energy_consumed=sum(parts.values()), emissions=0.5
    )
    used = metering._energy(data, "carbon")
    # 0.001 kWh in half an hour is 2 W.
    expected = Energy(0.003 + 0.01 * gpus, 0.5, 1800.0, source, 2.0, 20.0 * gpus, 4.0, [*assumes, "carbon"])
    assert used[:3] == pytest.approx(expected[:3]) and used[4:7] == pytest.approx(expected[4:7])
    assert (used.source, used.assumes) == (source, expected.assumes)


def test_total_by_hand():
    first = Energy(1.0, 0.5, 100.0, "measured", 10.0, 100.0, 1.0, ["a", "b"])
    second = Energy(2.0, 0.25, 300.0, "estimated", 30.0, 0.0, 1.0, ["c", "b"])
    # Watts by time: (10 x 100 + 30 x 300) / 400.
    assert total([first, second]) == Energy(3.0, 0.75, 400.0, "estimated", 25.0, 25.0, 1.0, ["a", "b", "c"])
    assert total([first, first]).source == "measured"


def test_an_unknown_country_is_refused(monkeypatch):
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "China")
    with pytest.raises(AntgmmError, match="CODECARBON_COUNTRY_ISO_CODE: no country 'CHINA': use a three-letter code"):
        metered().__enter__()
