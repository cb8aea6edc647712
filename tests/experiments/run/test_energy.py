"""Energy: what is read and what is assumed, sums by hand, no network, nothing left behind; a service's year by hand."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from codecarbon.input import DataSource
from typer.testing import CliRunner

from antgmm_jax.errors import AntgmmError
from experiments import cli
from experiments.fleet import service
from experiments.report import latency
from experiments.report.savings import kwh_a_year, payback
from experiments.run.host import energy
from experiments.run.host.energy import Energy, metered, total

ROOT = Path(__file__).resolve().parents[3]
COUNTED = """
import json, os, socket, time

def blocked(*_, **__):
    os.write(2, b"the network was asked")
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = blocked
from experiments.run.host.energy import metered
with metered() as read:
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        pass
    middle = read()
print(json.dumps([middle._asdict(), read()._asdict(), read()._asdict()]))
"""
# What a person may have set for other work.
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
    """Whether this machine lets a process read the energy of its CPU, or has a GPU with a driver."""
    zones = Path("/sys/class/powercap").glob("intel-rapl*:*")
    return any(os.access(zone / "energy_uj", os.R_OK) for zone in zones) or Path("/proc/driver/nvidia/gpus").exists()


def test_a_second_of_work_is_counted_and_nothing_else_is_done(tmp_path):
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
    middle, found, again = json.loads(done.stdout)
    assert found == again and middle["kwh"] <= found["kwh"] and middle["seconds"] < found["seconds"]
    assert found["source"] == ("measured" if has_counters() else "estimated")
    assert found["seconds"] >= 1.0 and found["kwh"] > 0
    watts = found["cpu_watts"] + found["gpu_watts"] + found["ram_watts"]
    assert found["kwh"] == pytest.approx(watts * found["seconds"] / 3.6e6)
    france = DataSource().get_global_energy_mix_data()["FRA"]["carbon_intensity"]
    assert found["kg_co2"] == pytest.approx(found["kwh"] * france / 1000)
    assert found["assumes"][-1] == f"{france:.0f} g CO2 a kWh (FRA)"
    told = re.match(r"CPU of (\d+) cores at ([\d.]+) W idle to ([\d.]+) W at full load", found["assumes"][0])
    if told:
        assert int(told[1]) == os.cpu_count() and float(told[2]) == pytest.approx(float(told[3]) / 10)
        assert 0 < found["cpu_watts"] <= float(told[3])
    else:
        assert found["assumes"][0] == "CPU read from RAPL counters"


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
def test_a_label_says_whether_counters_were_read(monkeypatch, assumed, gpus, source, assumes):
    monkeypatch.setattr(energy, "_cpu_watts", lambda: assumed)
    monkeypatch.setattr(energy.os, "cpu_count", lambda: 2)
    parts = {"cpu_energy": 0.001, "gpu_energy": 0.01 * gpus, "ram_energy": 0.002}
    data = SimpleNamespace(
        **parts, duration=1800.0, gpu_count=gpus, ram_power=20.0, energy_consumed=sum(parts.values()), emissions=0.5
    )
    found = energy._energy(data, "carbon")
    # 0.001 kWh in half an hour is 2 W.
    expected = Energy(0.003 + 0.01 * gpus, 0.5, 1800.0, source, 2.0, 20.0 * gpus, 4.0, [*assumes, "carbon"])
    assert found[:3] == pytest.approx(expected[:3]) and found[4:7] == pytest.approx(expected[4:7])
    assert (found.source, found.assumes) == (source, expected.assumes)


def test_parts_add_up():
    first = Energy(1.0, 0.5, 100.0, "measured", 10.0, 100.0, 1.0, ["a", "b"])
    second = Energy(2.0, 0.25, 300.0, "estimated", 30.0, 0.0, 1.0, ["c", "b"])
    # Watts by time: (10 x 100 + 30 x 300) / 400.
    assert total([first, second]) == Energy(3.0, 0.75, 400.0, "estimated", 25.0, 25.0, 1.0, ["a", "b", "c"])
    assert total([first, first]).source == "measured"


def test_an_unknown_country_is_refused(monkeypatch):
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "China")
    with pytest.raises(AntgmmError, match="CODECARBON_COUNTRY_ISO_CODE: no country 'CHINA': set its three letters"):
        metered().__enter__()


def test_a_requests_energy_is_the_loops_over_its_number(monkeypatch):
    asked = []

    @contextmanager
    def counted():
        yield lambda: Energy(len(asked) * 1e-6, 0.0, 1.0, "estimated", 1.0, 0.0, 0.0, [])

    def request():
        asked.append(1)
        return 0.1, 0.2, 0.3

    monkeypatch.setattr(latency, "metered", counted)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.0)
    found = latency.consumption(request, 7)
    assert len(asked) == found["requests"] == 7
    assert found["joules"] == pytest.approx(3.6) and found["kwh"] == pytest.approx(7e-6)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.05)
    assert latency.consumption(request, 1)["requests"] > 1


def test_a_year_and_a_payback_by_hand():
    # 31 536 000 seconds; 3.6 J are a millionth of a kWh.
    assert kwh_a_year(3.6, 1) == pytest.approx(31.536)
    assert kwh_a_year(1.0, 10_000) == pytest.approx(87_600)
    assert payback(0.5, 2.0) == 900_000
    assert payback(1.0, 7.0) == 514_286
    assert payback(0.5, 0.0) is None and payback(0.5, -1.0) is None


def test_a_service_by_hand():
    figures = service(400.0, 1.0, 700.0, 90.0, rate=10.0)
    assert figures["requests_a_day"] == 864_000
    # 400 W x 0.7 s; x 10 a second is 2 800 W; x 8 760 h.
    expected = {"joules": 280.0, "kwh_a_year": 24_528.0, "megawatts": 0.0028, "busy": 7.0}
    assert figures["teacher"] == pytest.approx(expected)
    assert figures["student"] == pytest.approx(
        {"joules": 36.0, "kwh_a_year": 3_153.6, "megawatts": 0.00036, "busy": 0.9}
    )
    assert figures["saved"] == pytest.approx(
        {"joules": 244.0, "kwh_a_year": 21_374.4, "megawatts": 0.00244, "busy": 6.1}
    )


@pytest.mark.parametrize(
    ("watts", "pue", "a_day"), [(300.0, 1.0, 4.0422e9), (400.0, 1.0, 3.0317e9), (400.0, 1.5, 2.0211e9)]
)
def test_the_papers_claim_by_hand(watts, pue, a_day):
    figures = service(watts, pue, 700.0, 90.0, kwh=75e6)
    # 75e6 kWh x 3.6e6 J / (watts x pue x 0.61 s) / 365 days.
    assert figures["requests_a_day"] == pytest.approx(a_day, rel=1e-4)
    # 75e6 kWh / 8 760 h, whatever a request costs.
    assert figures["saved"]["megawatts"] == pytest.approx(8.5616, rel=1e-4)
    assert figures["saved"]["kwh_a_year"] == pytest.approx(75e6)


def test_what_the_document_shows_is_what_the_command_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.findall(r"```console\n\$ antgmm (.*)\n((?:.*\n)*?)```", (ROOT / "docs" / "energy.md").read_text())
    assert len(shown) == 4
    for words, printed in shown:
        found = CliRunner().invoke(cli.app, words.split(), prog_name="antgmm").stdout
        assert [line.rstrip() for line in found.splitlines()] == printed.splitlines()
