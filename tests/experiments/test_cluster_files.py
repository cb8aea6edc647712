"""The files for Slurm, GKE and Docker are valid, agree with the command line, and are the ones that the guide shows."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jax._src.clusters.cloud_tpu_cluster import coordinator_port
from typer.testing import CliRunner

from antgmm_jax.errors import AntgmmError, OtherProcessError
from antgmm_jax.parallel.preemption import EXIT_CODE
from experiments.cli import app
from experiments.run.host.meshes import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "cluster"
MANIFESTS = ("gke-gpu.yaml", "gke-tpu.yaml")
KUBERNETES = "1.33"


def linted(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a linter that is installed beside Python, or elsewhere on the path."""
    place = shutil.which(tool, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert place, f"{tool} is not installed: run make install"
    return subprocess.run([place, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("tool", "name"), [("shellcheck", "slurm.sh"), ("hadolint", "Dockerfile"), ("hadolint", "../serving/Dockerfile")]
)
def test_linters_have_nothing_to_say(tool, name):
    result = linted(tool, str(FOLDER / name))
    assert result.returncode == 0, result.stdout + result.stderr


def job(name: str) -> dict:
    service, job = yaml.safe_load_all((FOLDER / name).read_text())
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    return job["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_schema_of_kubernetes(name):
    for document in yaml.safe_load_all((FOLDER / name).read_text()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def devices(arguments: list[str]) -> int:
    """Devices of the mesh of a command, which the command line accepts."""
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    return math.prod(parse(arguments[arguments.index("--mesh") + 1]).values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_devices_of_its_mesh(name):
    spec = job(name)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (count,) = container["resources"]["limits"].values()
    assert devices(container["args"]) == spec["completions"] * count == spec["parallelism"] * count
    for variable in container.get("env", []):
        if variable["name"] == "JAX_NUM_PROCESSES":
            assert int(variable["value"]) == spec["completions"]
    topology = pod.get("nodeSelector", {}).get("cloud.google.com/gke-tpu-topology")
    assert topology is None or math.prod(map(int, topology.split("x"))) == devices(container["args"])
    rules = [(rule["action"], rule["onExitCodes"]["values"]) for rule in spec["podFailurePolicy"]["rules"][:2]]
    assert rules == [("FailJob", [AntgmmError.exit_code]), ("Ignore", [EXIT_CODE])]
    assert AntgmmError.exit_code != OtherProcessError.exit_code


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_opens_the_port_of_the_coordinator_and_keeps_caches_on_its_volume(name):
    (container,) = job(name)["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    port = variables.get("JAX_COORDINATOR_ADDRESS", f":{coordinator_port}").rpartition(":")[2]
    assert int(port) in [each["containerPort"] for each in container["ports"]]
    (volume,) = {each["mountPath"] for each in container["volumeMounts"]} - {"/dev/shm"}
    assert all(variables[cache].startswith(f"{volume}/") for cache in ("XDG_CACHE_HOME", "HF_HOME"))


def test_the_job_script_has_the_devices_of_its_mesh_and_is_queued_again_after_sigterm():
    lines = (FOLDER / "slurm.sh").read_text().splitlines()
    headers = [line for line in lines if line.startswith("#SBATCH")]
    # sbatch ignores options after the first command.
    assert lines[: len(headers) + 1] == ["#!/bin/bash", *headers]
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in headers)
    (command,) = (shlex.split(line) for line in lines if line.startswith("srun"))
    assert command[:2] == ["srun", "antgmm"]
    assert devices(command[2:]) == int(options["nodes"]) * int(options["ntasks-per-node"])
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one process per GPU
    assert options["signal"].startswith("TERM@") and "requeue" in options
    assert f'"$code" -eq {EXIT_CODE}' in "\n".join(lines)


def test_the_image_installs_extras_that_exist():
    text = (FOLDER / "Dockerfile").read_text()
    (extras,) = re.findall(r'"\.\[([a-z,]+)\]"', text)
    assert {*extras.split(",")} <= {
        *tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    }


def test_the_guide_shows_these_files():
    guide = (ROOT / "docs" / "guides" / "cluster.md").read_text()
    shown = re.findall(r'^--8<-- "experiments/cluster/([^"]+)"$', guide, flags=re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in FOLDER.iterdir())
