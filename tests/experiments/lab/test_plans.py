"""The steps that must stay feasible: legal, and as large in memory as when they were last compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from experiments.lab.planning import cases, compilers
from experiments.lab.planning.chips import CHIPS
from pruning.costs import total_parameters
from tests.experiments.lab.test_planning import clean

ROOT = Path(__file__).resolve().parents[3]
RECORDED = json.loads((ROOT / "experiments" / "lab" / "results" / "plans.json").read_text())

_STAYS = """
import json
from experiments.lab.planning import cases, compilers
from experiments.lab.planning.step import stays
from experiments.run.host.meshes import simulate

compilers.only_compile()
simulate(64)
listed, machines = cases.load()
print(json.dumps({
    f"{case.name} on {chip}-{count}": stays(case.on(count), {"data": 1, "fsdp": count, "tensor": 1})
    for case in listed for chip, count in machines
}))
"""


@pytest.mark.long
def test_what_stays_on_a_device_is_what_was_planned(tmp_path):
    command = [sys.executable, "-c", _STAYS]
    done = subprocess.run(command, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    now = json.loads(done.stdout)
    assert RECORDED.keys() <= now.keys()
    for name, each in RECORDED.items():
        kinds = ("teacher", "parameters", "moments", "batch")
        assert now[name] == sum(each["memory"][kind] for kind in kinds), name


@pytest.mark.parametrize("case", cases.load()[0], ids=lambda case: case.name)
def test_every_step_was_planned_for_a_machine_of_gpus_and_fits_all_that_were_tried(case):
    assert f"{case.name} on H100-8" in RECORDED
    for name, each in RECORDED.items():
        if not name.startswith(f"{case.name} on "):
            continue
        chip, count = cases.machine(name.split(" on ")[1])
        assert each["fits"] == (sum(each["memory"].values()) <= CHIPS[chip].memory) == (name not in TOO_LARGE), name
        # A plan of another size or batch says nothing about this one.
        models = (case.spec.teacher, case.spec.student)
        assert each["parameters"] == [total_parameters(model) for model in models if model], name
        assert each["student"] == sizes(case.spec.student) and each["batch"] == case.on(count).batch, name


TOO_LARGE: set[str] = set()


def test_plans_are_kept_and_their_table_is_printed(antgmm, refused, monkeypatch, tmp_path):
    compiled = []

    def planned(spec, chip, count):
        compiled.append((spec.batch, chip, count))
        memory = {"teacher": 2_000_000_000, "temporaries": 3_000_000_000, "layout": 0}
        return {
            "memory": memory,
            "fits": True,
            "sent": 4e9,
            "least": 0.05,
            "estimated": 0.1,
            "links": 0.02,
            "share": 0.5,
        }

    monkeypatch.setattr(compilers, "check", lambda chip: None)
    monkeypatch.setattr(cases, "planned", planned)
    words = ("lab", "plans", "--out", tmp_path / "plans.json", "--case", "7 B to 1.4 B")
    shown = antgmm(*words, "--machine", "v5e-16", "--machine", "v5e-64").stdout
    # Up to 16 chips share the batch of the case; 64 have four times as many rows.
    assert compiled == [(64, "v5e", 16), (256, "v5e", 64)]
    [row] = [line for line in shown.splitlines() if "v5e-16" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("7 B to 1.4 B", "v5e-16", "yes", "2", "3", "4", "50", "100", "20", "0.50"),
    ]
    written = (tmp_path / "plans.md").read_text().splitlines()
    assert written[0].startswith("| step | machine | fits | ")
    assert written[2] == "| 7 B to 1.4 B | v5e-16 | yes | 2 | 3 | 4 | 50 | 100 | 20 | 0.50 |"
    antgmm(*words, "--machine", "v5e-16")
    assert len(compiled) == 2
    antgmm(*words, "--machine", "v5e-16", "--again")
    assert compiled[2] == (64, "v5e", 16)
    assert refused(*words[:-1], "8 B to 1 B").startswith("--case 8 B to 1 B: choose one of 7 B to 1.4 B, ")
    assert refused(*words, "--machine", "v9-16").startswith("machine 'v9-16': write it as CHIP-COUNT, with one of v5e")


def test_a_case_with_illegal_sizes_is_refused(tmp_path):
    path = tmp_path / "plans.toml"
    case = 'preset = "llava-tiny"\nrows = 8\nlength = 24\nanswer = 8\nname = "x"\nstudent = { "text/heads" = 3 }'
    path.write_text(f'machines = ["v5e-4"]\n[[case]]\n{case}\n')
    with pytest.raises(AntgmmError):
        cases.load(path)
