"""Processes of the server: they start and end together, and what ends them is said in one line."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from litserve.utils import WorkerSetupStatus

from antgmm_jax.errors import AntgmmError
from data.record import Record
from experiments.lab.servers.starting import serving
from experiments.lab.servers.under_load import under_load
from experiments.run.scores.server import answers, connect
from experiments.serving.server import Answers, application, check_port

TOKENS = 4


def children(process):
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
    inside = {process}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return inside


def left_of(running):
    """The processes that are still there after ten seconds; one of multiprocessing's own ends last."""
    end = time.monotonic() + 10
    while (left := [pid for pid in running if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts."""
    processes, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    return processes


def begun(process):
    """When a process started, in ticks since the machine did."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AntgmmError, match=r"cannot listen at 127\.0\.0\.1:\d+ .*: choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(("code", "remedy"), [(-9, "choose a machine with more memory"), (1, "try again")])
def test_a_worker_that_dies_while_it_loads_is_one_line(tmp_path, monkeypatch, code, remedy):
    server = application(Answers(tmp_path, "m", max_new_tokens=TOKENS, most=2, wait=0.01), "m", timeout=1.0)
    server.workers_setup_status = {"completions_0": WorkerSetupStatus.STARTING}
    server.inference_workers = [SimpleNamespace(is_alive=lambda: False, exitcode=code, kill=lambda: None)]
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for a dead process"))
    with pytest.raises(AntgmmError, match=rf"^the worker died while it was .* \(exit code {code}\): {remedy}$"):
        server.verify_worker_status()


def test_sigterm_while_the_model_loads_ends_the_worker(tmp_path, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    server, killed = application(Answers(tmp_path, "m", max_new_tokens=TOKENS, most=2, wait=0.01), "m", timeout=1.0), []
    server.workers_setup_status = {"completions_0": WorkerSetupStatus.STARTING}
    server.inference_workers = [SimpleNamespace(is_alive=lambda: True, kill=lambda: killed.append(0))]
    monkeypatch.setattr("time.sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        server.verify_worker_status()
    assert killed == [0]


@pytest.mark.long
def test_a_server_answers_counts_and_leaves_no_process(tmp_path, started):
    """With a model that answers in capitals."""
    stub = str(Path(__file__).with_name("stub_server.py"))
    records, limits = [Record(images=(), question=f"q{n}", answer="") for n in range(4)], {"max_new_tokens": TOKENS}
    with serving(lambda port: [sys.executable, stub, str(port)], tmp_path / "log") as url:
        server = connect(url)
        alone = answers(server, records, "{question}", clients=4, **limits)
        assert alone == ["Q0", "Q1", "Q2", "Q3"]
        figures = under_load(server, records, "{question}", [*alone[:3], "?"], clients=2, duration=0.5, **limits)
        assert figures["requests"] > 3
        assert figures["errors"] == 0
        assert 0 < figures["other_answers"] < figures["requests"]
        assert 0 < figures["p50_ms"] <= figures["p95_ms"]
        running = children(started[0].pid)
        assert len(running) > 2
        with urllib.request.urlopen(url.replace("/v1", "/metrics/"), timeout=10) as reply:
            count = float(re.search(r'antgmm_requests_total{status="200"} (\S+)', reply.read().decode())[1])
        assert count == 4 + figures["requests"]
        request = urllib.request.Request(f"{url}/chat/completions", b"{}", {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.close()
    assert not left_of(running)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("place", ["worker", "interface"])
def test_a_server_of_which_a_process_is_killed_ends_with_one_line(tmp_path, started, place):
    stub = str(Path(__file__).with_name("stub_server.py"))
    with serving(lambda port: [sys.executable, stub, str(port)], tmp_path / "log"):
        server, running = started[0], children(started[0].pid)
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running}
        # The worker is spawned, the interface is forked last.
        (worker,) = (pid for pid, line in lines.items() if b"spawn_main" in line)
        interface = max((pid for pid, line in lines.items() if b"multiprocessing" not in line), key=begun)
        assert interface != server.pid
        os.kill(worker if place == "worker" else interface, signal.SIGKILL)
        assert server.wait(60) != 0
    log = (tmp_path / "log").read_text()
    line = "error: the server ends: a process died (exit code -9): choose a machine with more memory"
    assert log.splitlines()[-1] == line
    assert log.count("the server ends") == 1 and "Traceback" not in log
    assert not left_of(running)


def test_a_server_that_ends_at_once_is_one_line(tmp_path):
    with (
        pytest.raises(AntgmmError, match=r"the server ended with code 3 before it was ready: see .*log"),
        serving(lambda port: [sys.executable, "-S", "-c", "raise SystemExit(3)"], tmp_path / "log"),
    ):
        pass
