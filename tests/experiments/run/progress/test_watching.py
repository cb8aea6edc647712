"""Metrics of steps in event files and trackers, and traces of steps."""

import json
import struct
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import pruning
from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import EXTRAS
from antgmm_jax.families.blip2.presets import sized
from antgmm_jax.parallel import processes
from antgmm_jax.parallel.sharding import make_mesh
from distill import Progress
from experiments.run.host.logs import check_logs
from experiments.run.host.tracing import Trace, parse_steps
from experiments.run.progress import watching
from experiments.run.progress.watching import Watch
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))


def events(folder):
    """The scalars of all event files of a folder, as (name, step) -> value; they are framed like TFRecords."""
    scalars = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + length])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    return scalars


CONFIG = sized(
    vision=(1, 32, 2, 48),
    bridge=(1, 32, 2, 48),
    text=(1, 1, 32, 2, 48),
    head_dims=(16, 16, 16),
    image=32,
    patch=16,
    queries=4,
    vocab=64,
    image_token=3,
)
BATCH = {
    "input_ids": np.ones((8, 6), np.int32),
    "attention_mask": np.array([[1] * 5 + [0]] * 8, np.int32),
    "decoder_input_ids": np.ones((8, 3), np.int32),
    "targets": np.array([[7, 1, -100]] * 8, np.int32),
}


@pytest.mark.parametrize("devices", [1, 2])
def test_event_files_hold_losses_speed_memory_and_utilisation(recipe, tmp_path, monkeypatch, devices):
    times = iter([100.0, 104.0])
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(times)))
    mesh = jax.set_mesh(make_mesh(data=devices)) if devices > 1 else nullcontext()
    with mesh, watching.watching(Watch(["tensorboard"], peak=1e9), tmp_path, recipe) as watcher:
        stage = watcher.stage(recipe.work[0], None)
        taken, batches = stage.step(lambda: None, 0), stage.batches(iter([BATCH] * 11))
        assert taken() is None
        for number in range(1, 12):
            next(batches)
            if number in (1, 11):
                stage.report(Progress(number, 11, {"loss": 0.5 * number, "hard": 2.0}), CONFIG)
    scalars = events(tmp_path / "metrics" / "01-blocks")
    assert scalars["loss", 1] == 0.5 and scalars["loss", 11] == 5.5 and scalars["hard", 11] == 2.0
    assert scalars["host_bytes", 11] > 1e7
    assert ("step_seconds", 1) not in scalars  # compilation
    assert scalars["step_seconds", 11] == pytest.approx(0.4)
    # 8 rows of 5 prompt tokens and 2 answer tokens.
    assert scalars["tokens_per_second", 11] == 8 * 7 * 10 / 4
    flops = 3 * sum(pruning.forward_flops(CONFIG, 8, 6, 3).values())
    assert scalars["mfu", 11] == pytest.approx(flops / 0.4 / (1e9 * devices))  # those of the mesh alone


def test_a_resumed_stage_continues_its_curves_in_a_second_file(recipe, tmp_path):
    for steps in ((1, 10), (6, 20)):
        with watching.watching(Watch(["tensorboard"]), tmp_path, recipe) as watcher:
            stage = watcher.stage(recipe.work[0], None)
            for step in steps:
                stage.report(Progress(step, 20, {"loss": float(step)}), CONFIG)
    assert [step for name, step in events(tmp_path / "metrics" / "01-blocks") if name == "loss"] == [1, 10, 6, 20]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_recipe_and_the_steps_of_the_run(recipe, tmp_path, monkeypatch, name):
    calls = []
    library = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, name, library)
    with watching.watching(Watch([name]), tmp_path / "ads", recipe) as watcher:
        stage = watcher.stage(recipe.work[0], None)
        stage.report(Progress(2, 4, {"loss": 1.5}), CONFIG)
    started, (values, step), finished = calls
    assert started["name"] == "ads" and started["resume"] == "allow"
    assert started["config"]["optimizer"]["batch_size"] == 8
    json.dumps(started["config"])
    assert values["01-blocks/loss"] == 1.5 and step == 2 and finished == "finished"


def test_a_tracker_that_refuses_to_start_is_reported_in_one_line(recipe, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    refused = pytest.raises(AntgmmError, match=r"^--log wandb: no API key configured; correct this, or leave out")
    with refused, watching.watching(Watch(["wandb"]), tmp_path, recipe):
        pass


def test_a_tracker_that_refuses_to_start_is_reported_in_every_process(recipe, tmp_path, monkeypatch):
    """The others went on without the first process, and waited for it for ever."""

    def refuse(**_):
        raise RuntimeError("no API key")

    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number, broadcast in enumerate((lambda text: sent.append(text) or text, lambda text: sent[0])):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        monkeypatch.setattr(processes, "broadcast_from_first", broadcast)
        refused = pytest.raises(AntgmmError, match=r"^--log wandb: no API key; correct this, or leave out --log wandb$")
        with refused, watching.watching(Watch(["wandb"]), tmp_path, recipe):
            pass


def test_a_log_that_fails_while_it_is_written_is_named_once_and_the_run_goes_on(recipe, tmp_path, monkeypatch, capsys):
    """The first process alone writes logs: its error left the others waiting for it."""

    def lost(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, log=lost, finish=lost))
    with watching.watching(Watch(["wandb", "tensorboard"]), tmp_path, recipe) as watcher:
        stage = watcher.stage(recipe.work[0], None)
        for step in (1, 10):
            stage.report(Progress(step, 20, {"loss": float(step)}), CONFIG)
    assert capsys.readouterr().err == "warning: the run goes on without --log wandb: no route to host\n"
    assert [step for name, step in events(tmp_path / "metrics" / "01-blocks") if name == "loss"] == [1, 10]


def test_a_log_that_is_not_installed_is_named(monkeypatch):
    with pytest.raises(AntgmmError, match="^--log mlflow: choose from tensorboard, wandb, trackio$"):
        check_logs(["mlflow"])
    monkeypatch.setitem(EXTRAS, "tensorboard", ("metrics for TensorBoard", ("no_such_package",)))
    with pytest.raises(AntgmmError, match=r": .venv/bin/pip install -e '\.\[tensorboard\]' -c constraints\.txt$"):
        check_logs(["tensorboard"])
    monkeypatch.setattr("experiments.run.host.logs.find_spec", lambda name: None)
    with pytest.raises(AntgmmError, match="^--log trackio needs trackio: pip install trackio$"):
        check_logs(["trackio"])


def test_steps_of_a_profile_are_parsed():
    assert parse_steps("") == range(0)
    assert parse_steps("3") == range(3, 4)
    assert parse_steps("10:14") == range(10, 15)
    for text in ("ten", "5:3", "1:2:3", "-1", ":4", "4:"):
        with pytest.raises(AntgmmError, match=f"^--profile {text}: write it as FIRST:LAST"):
            parse_steps(text)


@pytest.mark.parametrize("last", [4, 100])
def test_a_trace_holds_the_steps_and_is_written_once(tmp_path, last):
    """Also if training ends before the last step."""
    program = jax.jit(lambda x: x * 2 + 1)
    trace = Trace(range(2, last + 1), tmp_path)
    step = trace.around(program, 0)
    for _ in range(6):
        step(jnp.ones(3))
    trace.close()
    (written,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert written.is_relative_to(tmp_path / "process-0") and [*tmp_path.rglob("*.xplane.pb")]
    later = trace.around(program, 0)
    for _ in range(6):
        later(jnp.ones(3))
    assert len([*tmp_path.rglob("*.xplane.pb")]) == 1


def test_a_trace_ends_with_its_last_step_also_in_another_part_of_a_stage(tmp_path):
    trace = Trace(range(2, 5), tmp_path)
    for begin, count in ((0, 4), (4, 3)):
        step = trace.around(jax.jit(lambda x: x * 2 + 1), begin)
        for _ in range(count):
            step(jnp.ones(3))
    assert len([*tmp_path.rglob("*.xplane.pb")]) == 1
    trace.close()
    assert len([*tmp_path.rglob("*.xplane.pb")]) == 1


def test_a_profile_of_steps_that_are_over_changes_nothing(tmp_path):
    def step():
        return 1

    assert Trace(range(0), tmp_path).around(step, 0) is step
    assert Trace(range(2, 4), tmp_path).around(step, 3) is step
