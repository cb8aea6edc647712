"""Where libtpu is installed and no accelerator is, JAX starts on the CPU and prints nothing."""

import os
import subprocess
import sys

import pytest

from experiments.run.host import accelerators

START = "from experiments.cli import environment; environment(); import jax; print(jax.default_backend())"


@pytest.mark.skipif(not accelerators.only_cpu(), reason="has an accelerator, or lacks libtpu")
def test_a_command_on_a_cpu_prints_no_warnings_of_libtpu():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(("files", "chosen", "expected"), [(1, None, True), (0, None, False), (1, "cpu", False)])
def test_a_gpu_that_jax_leaves_unused_is_noticed(monkeypatch, tmp_path, files, chosen, expected):
    for number in range(files):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if chosen:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    monkeypatch.setattr(accelerators, "GPU", f"{tmp_path}/nvidia[0-9]*")
    assert accelerators.unused_gpu() is expected


@pytest.mark.parametrize(("installed", "files", "expected"), [(True, 0, True), (True, 1, False), (False, 0, False)])
def test_an_accelerator_or_no_libtpu_leaves_the_choice_to_jax(monkeypatch, tmp_path, installed, files, expected):
    for number in range(files):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(accelerators, "DEVICES", (f"{tmp_path}/nvidia*",))
    monkeypatch.setattr(accelerators, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert accelerators.only_cpu() is expected
