"""Options of runs that do not change their result, and the exit code after SIGTERM."""

import pytest

from antgmm_jax.io import hub
from antgmm_jax.parallel import preemption
from experiments.report import write
from tests.experiments.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.toml", tmp_path / "teacher")


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("gs://bucket/run", (), "--run gs:/bucket/run: a run works in a folder; use --run DIR --mirror URL"),
        ("run", ("--profile", "5:3"), "--profile 5:3: write it as FIRST:LAST, as in 10:14"),
        ("run", ("--log", "mlflow"), "--log mlflow: choose from tensorboard, wandb, trackio"),
        ("run", ("--mirror", "runs/a"), "runs/a is not the URL of a store: write it as gs://BUCKET/FOLDER or s3://"),
        ("run", ("--mirror", "nosuch://b/a"), "nosuch://b/a: Protocol not known: nosuch: use gs://, s3:// or"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_run(refused, recipe, tmp_path, run, options, message):
    assert refused("compress", recipe, "--run", run, *options).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--run", "notes.txt"), "--run notes.txt is a file: name a folder"),
        (("--run", "run", "--mirror", "gs://b/run"), "--mirror needs a RECIPE: write it with --plan in one process"),
        (("--run", "run", "--coordinator", "auto"), "several processes need a RECIPE: write it with --plan in one"),
        (("--run", "run", "--log", "mlflow"), "--log mlflow: choose from tensorboard, wandb, trackio"),
        (("--run", "run", "--profile", "5:3"), "--profile 5:3: write it as FIRST:LAST, as in 10:14"),
        (("--run", "run", "--minutes", "1e308"), "--minutes 1e+308: write a number below 1e+06"),
    ],
)
@pytest.mark.parametrize("budget", [("--smaller", "8x"), ("--keep-quality", "98%")])
def test_options_that_cannot_work_are_refused_before_anything_is_planned(
    refused, monkeypatch, tmp_path, budget, options, message
):
    for name in ("experiments.auto.plan.planned", "experiments.auto.keeping.Search"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a plan is made"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "rows.jsonl").touch()
    assert refused("compress", "--model", "m", "--data", "rows.jsonl", *budget, *options).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "rows.jsonl"]


def test_a_run_without_its_plan_is_not_planned_anew(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.auto.plan.planned", lambda *_, **__: pytest.fail("a plan is made"))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    assert refused("compress", "--model", "m", "--data", "rows.jsonl", "--smaller", "8x", "--run", "run") == (
        "run is a run without its plan run.toml: antgmm compress run/recipe.toml --run run continues it, or choose"
        " another --run"
    )


def test_a_preempted_run_says_how_to_go_on(antgmm, recipe, monkeypatch):
    def preempted(run, **_):
        raise preemption.Preempted

    monkeypatch.setattr(write, "finish", preempted)
    result = antgmm("compress", recipe, "--run", "run")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "preempted, and saved; run the same command to resume"


@pytest.mark.parametrize("push", [("--push", "hf:org/student"), ()], ids=["pushed", "kept"])
def test_the_upload_of_a_quantized_copy_is_named(antgmm, recipe, monkeypatch, push):
    monkeypatch.setenv(hub.OFFLINE, "0")
    monkeypatch.setattr(write, "finish", lambda run, **_: {})
    done = []
    for name in ("commands.runs.check_quantized", "commands.runs.advise", "commands.runs.print_end"):
        monkeypatch.setattr(f"experiments.{name}", lambda *_, **__: None)
    for name in ("run.export.quantized.quantize_export", "commands.runs.upload"):
        monkeypatch.setattr(f"experiments.{name}", lambda *_, name=name, **__: done.append(name.split(".")[-1]))
    result = antgmm("compress", recipe, "--run", "run", "--quantize", "w8a8", *push)
    assert result.exit_code == 0
    command = "`hf upload org/student-w8a8 run/export-w8a8 --private --delete 'model*.safetensors*'`"
    note = f"note: --push uploads run/export alone; the quantized copy is uploaded by {command}"
    assert (note in result.stderr.splitlines()) is bool(push)
    assert done == ["quantize_export", "upload"]  # a failed upload must not cost the quantized copy
