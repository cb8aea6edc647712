"""Options for meshes, devices and processes."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import pytest

from antgmm_jax.errors import AntgmmError, OtherProcessError
from antgmm_jax.parallel import preemption
from experiments.lab.servers.starting import free_port
from experiments.run.host import meshes
from experiments.run.host.meshes import devices, parse

ROOT = Path(__file__).resolve().parents[3]


def test_a_mesh_is_parsed():
    assert parse("data=2, tensor=4") == {"data": 2, "tensor": 4}
    assert parse("") == {}


@pytest.mark.parametrize("text", ["data", "data=two", "data=0", "model=2", "data=2,tensor=", "data=-1"])
def test_an_invalid_mesh_is_refused(text):
    with pytest.raises(AntgmmError, match=f"^--mesh {text}: specify sizes of data, fsdp, tensor, as in data=2"):
        parse(text)


def test_one_device_needs_no_mesh():
    with devices("", "", 1, 0):
        assert jax.sharding.get_mesh().empty


def test_a_mesh_is_set_only_during_the_run():
    jax.devices()  # starts the eight devices of conftest
    with devices("fsdp=4,tensor=2", "", 1, 0):
        assert dict(jax.sharding.get_mesh().shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert jax.sharding.get_mesh().empty
    message = r"^mesh data=16,fsdp=1,tensor=1 needs 16 devices: there are 8 \(cpu\): choose .* at most 8$"
    with pytest.raises(AntgmmError, match=message), devices("data=16", "", 1, 0):
        pass


def test_a_cpu_machine_provides_the_requested_number_of_devices():
    code = (
        "import jax; from experiments.run.host.meshes import devices\n"
        "with devices('data=3', '', 1, 0): print(jax.device_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["3"]


@pytest.mark.parametrize(("mesh", "said"), [("", False), ("data=2", True)])
def test_simulated_devices_are_named(mesh, said, capsys):
    with devices(mesh, "", 1, 0):
        pass
    note = f"note: --mesh {mesh} has simulated devices: times and memory are those of this CPU\n"
    assert capsys.readouterr().err == note * said


def test_devices_are_not_simulated_beside_gpus_that_jax_does_not_use(monkeypatch):
    monkeypatch.setattr(meshes, "unused_gpu", lambda: True)
    refused = "^--mesh fsdp=2: JAX does not use the GPU .*JAX_PLATFORMS=cpu simulates"
    with pytest.raises(AntgmmError, match=refused), devices("fsdp=2", "", 1, 0):
        pass


def test_several_processes_need_a_coordinator():
    with pytest.raises(AntgmmError, match="^--processes 2: add --coordinator"), devices("", "", 2, 0):
        pass


def test_a_process_with_a_coordinator_ends_on_a_second_sigterm():
    code = (
        "import os, signal, sys, time; from experiments.run.host.meshes import devices\n"
        "with devices('', sys.argv[1], 1, 0):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)"
    )
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run([sys.executable, "-c", code, address], cwd=ROOT, capture_output=True, timeout=50)
    assert done.returncode == preemption.EXIT_CODE == 143


LOOP = """
import os, signal, sys, time
from antgmm_jax.parallel import preemption
from experiments.run.host.meshes import devices

process = int(sys.argv[2])
with devices("", sys.argv[1], 2, process):
    for step in range(100):
        if process == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if preemption.requested():
            print(step)
            sys.exit(preemption.EXIT_CODE)
        time.sleep(0.2 + 0.1 * process)
"""


def test_after_sigterm_to_one_process_both_leave_at_the_same_point():
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", LOOP, address]
    both = [subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, text=True) for name in "01"]
    try:
        (first, _), (second, _) = (process.communicate(timeout=120) for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [preemption.EXIT_CODE] * 2
    steps = [output.splitlines()[-1] for output in (first, second)]  # after a line of Gloo
    assert steps[0] == steps[1] and 3 < int(steps[0]) < 100


COMPILED = """
import sys
import jax
from experiments.run.host.meshes import devices

with devices("", sys.argv[1], 2, int(sys.argv[2])):
    jax.jit(lambda x: x + 1)(1)
    print(jax.config.jax_enable_compilation_cache)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_programs_are_kept_only_where_all_processes_see_them(tmp_path, shared):
    """XLA's processes wait for each other while they compile for GPUs, so none may read what others compile."""
    command = [sys.executable, "-c", COMPILED, f"127.0.0.1:{free_port()}"]
    folders = [tmp_path / ("0" if shared else name) for name in "01"]
    keep = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    both = [
        subprocess.Popen(
            [*command, name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**keep, "JAX_COMPILATION_CACHE_DIR": str(folder)},
        )
        for name, folder in zip("01", folders, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [output.split()[-1] for output in outputs] == [str(shared)] * 2, outputs
    note = f"note: not all processes see {folders[0]}: programs are compiled at each start"
    assert [" ".join(output.split()).count(note) for output in outputs] == [0 if shared else 1, 0]
    kept = [path.name for path in folders[0].iterdir()]
    assert any(name.startswith("jit_") for name in kept) == shared
    assert not [name for name in kept if name.startswith(".seen")]


DIFFERENT = """
import sys
from antgmm_jax.errors import AntgmmError, OtherProcessError
from antgmm_jax.parallel.processes import check_equal
from experiments.run.host.meshes import devices

with devices("", sys.argv[1], 2, int(sys.argv[2])):
    check_equal("recipe", "the same")
    try:
        check_equal("recipe", "a rate of process " + sys.argv[2])
    except AntgmmError as error:
        print(error)
"""


def test_processes_with_different_recipes_are_refused_in_all_of_them():
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", DIFFERENT, address]
    both = [subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, text=True) for name in "01"]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    line = "process 1 has another recipe than process 0: start all with the same command and the same files"
    assert [output.splitlines()[-1] for output in outputs] == [line, line]  # after a line of Gloo


def test_a_failed_connection_is_refused_in_one_line():
    jax.devices()  # JAX cannot connect to others after it has started alone
    refused = pytest.raises(AntgmmError, match=r"^--coordinator localhost:1: .*initialize.*before[^\n]*$")
    with refused, devices("", "localhost:1", 2, 1):
        pass


def test_the_loss_of_another_process_is_reported(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(meshes, "share_programs", lambda: None)
    monkeypatch.setattr(meshes, "agreed", nullcontext)
    message = r"has failed \(UNKNOWN: closed by peer\): start all of them again$"
    with pytest.raises(OtherProcessError, match=message), devices("data=8", "localhost:1", 2, 1):
        raise jax.errors.JaxRuntimeError("UNKNOWN: closed by peer\nat line 1")
