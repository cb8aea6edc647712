"""Errors of commands are one line with exit code 2, and say how to go on."""

import json
import os

import pytest

from antgmm_jax.errors import AntgmmError
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import write_recipe

SHRINK = ("shrink", "nowhere", "--out", "o", "--importance", "magnitude")
SERVICE = ("lab", "energy", "--watts", "400", "--teacher-ms", "700", "--student-ms", "90")
# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.hrad=1.0", "unknown key loss.hrad, did you mean 'hard'?"),
        ('stage.0.sizes={"vision/embed"=20}', "nearest legal sizes: vision/embed 16 or 24"),
        ('stage.0.sizes={"vision/layers"=9}', "vision/layers = 9 would enlarge the axis: it has 2 units"),
        ('stage.0.sizes={"vision/leyers"=1}', "unknown axis 'vision/leyers': did you mean 'vision/layers'?"),
        ('parent="nowhere"', "nowhere"),
    ],
)
def test_a_bad_recipe_is_refused_and_leaves_nothing(refused, teacher, tmp_path, change, message):
    recipe = write_recipe(tmp_path / "r.toml", teacher, sizes='"vision/layers" = 1')
    assert message in refused("compress", recipe, "--run", "run", "--set", change)
    assert not (tmp_path / "run").exists()


def test_a_bad_checkpoint_is_refused(refused, teacher, tmp_path):
    weights = teacher / "model.safetensors"
    recipe, whole = write_recipe(tmp_path / "r.toml", teacher), weights.read_bytes()
    commands = (["compress", recipe, "--run", "run"], ["import", teacher], ["cost", teacher])
    weights.write_bytes(whole[: len(whole) // 2])
    for words in commands:
        assert f"{weights} cannot be read" in refused(*words)
    weights.write_bytes(whole)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    for words in commands:
        assert "model_type 'qwen2_vl' is not supported: use one of blip-2, llava" in refused(*words)
    (teacher / "config.json").unlink()
    assert "config.json is missing" in refused("import", teacher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml", "teacher"]


def test_a_folder_of_another_run_is_refused_and_unchanged(refused, teacher, tmp_path):
    recipe, run = write_recipe(tmp_path / "r.toml", teacher), tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "is not empty and not a run" in refused("compress", recipe, "--run", run)
    (run / "notes.txt").unlink()
    dumped = tmp_path / "dumped.toml"
    from experiments.run.schema.recipe import dump_recipe

    dumped.write_text(dump_recipe(load_recipe(recipe)))
    (run / "recipe.toml").write_text(dumped.read_text())
    complaint = refused("compress", recipe, "--run", run, "--set", "seed=7")
    assert "is a run of another recipe (seed: 0 / 7)" in complaint
    assert (run / "recipe.toml").read_text() == dumped.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost"], "--preset"),
        (["cost", "--preset", "antgmm-huge"], "unknown preset 'antgmm-huge'"),
        (["report", "nowhere"], "nowhere has no report"),
        (["compress", "none.toml", "--run", "run"], "cannot read the recipe none.toml"),
        (
            ["data", "maad", "--split", "tset", "--out", "d"],
            "no split 'tset': choose one of train, val, test, test_hard",
        ),
        (["recombine", "none.toml", "--run", "run", "--from", "a", "--steps", "1"], "cannot read the recipe none.toml"),
        (["export", "nowhere", "--like", "t", "--out", "o"], "nowhere"),
        (["shrink", "nowhere", "--out", "o"], "--size or --like"),
        (["shrink", "nowhere", "--out", "o", "--size", "vision/mlp=1", "--like", "antgmm-300m"], "--size or --like"),
        ([*SHRINK, "--size", "vision/mlp=no"], "write it as vision/layers=12"),
        ([*SHRINK, "--size", "vision/mlp=1.5"], "write it as vision/layers=12"),
        ([*SHRINK, "--like", "antgmm-300m"], "nowhere/config.json is missing"),
        (["shrink", "nowhere", "--out", "o", "--like", "antgmm-300m"], "add --data jsonl:PATH"),
        ([*SHRINK, "--like", "antgmm-300m", "--data", "jsonl:d"], "add --data jsonl:PATH"),
        ([*SERVICE], "specify either --kwh-a-year"),
        ([*SERVICE, "--rate", "1", "--kwh-a-year", "1"], "specify either --kwh-a-year"),
        ([*SERVICE[:-1], "800", "--kwh-a-year", "1"], "saves nothing at this power and these latencies"),
    ],
)
def test_errors_are_one_line(refused, tmp_path, words, message):
    assert message in refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost", "\udcff"], "? is not UTF-8: rename it"),
        ([*SHRINK, "--size", f"vision/layers={'[' * 100_000}"], "write it as vision/layers=12"),
        ([*SHRINK, "--size", "vision/layers=1", "--max-shard-size", "0"], "write it as 500MB or 5GB"),
        (["compress", "r.toml", "--run", "run", "--mesh", f"fsdp={'9' * 5000}"], "as in data=2,fsdp=2,tensor=2"),
        (["eval", "teacher", "--data", "jsonl:a.jsonl", "--mesh", "data=999999"], "at most 512 are supported"),
        (["compress", "r.toml", "--run", "run", "--mesh", ","], "as in data=2,fsdp=2,tensor=2"),
        (["compress", "--model", "m", "--data", "a.jsonl", "--smaller", "2x", "--run", "."], "a folder of its own"),
        (["compress", "pipe.toml", "--run", "run"], "pipe.toml is not a regular file: replace it with one"),
        (["eval", "teacher", "--data", "jsonl:a.jsonl", "--answers", "a.jsonl"], "exists and holds no answers"),
        (["eval", "teacher", "--data", "jsonl:a.jsonl", "--answers", "teacher"], "is a folder: name a file"),
    ],
)
def test_nothing_odd_is_more_than_one_line(refused, teacher, tmp_path, words, message):
    write_recipe(tmp_path / "r.toml", teacher)
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    os.mkfifo(tmp_path / "pipe.toml")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert message in refused(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("maad:s", "write it as maad:TIER:SPLIT"),
        ("csv:a.csv", "write it as maad:TIER:SPLIT"),
        ("maad:xl:test", "tier = 'xl': Input should be 's', 'm' or 'full'"),
        ("jsonl:a.jsonl", "a.jsonl does not exist"),
    ],
)
def test_unknown_forms_of_data_are_refused(data, message):
    from experiments.commands.sources import records

    with pytest.raises(AntgmmError, match=message):
        records(data, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost", "--batch", "0"], "invalid value for '--batch': "),
        (["cost", "--bacth", "1"], "no such option: --bacth"),
        (["cost", "a", "b\nc"], "got unexpected extra argument"),
        (["cost", "--preset"], "option '--preset' requires an argument (see antgmm cost --help)"),
        (["shrink", "m"], "missing option '--out' (see antgmm shrink --help)"),
        (["lab", "bnech"], "no such command 'bnech'. Did you mean 'bench'? (see antgmm lab --help)"),
        (["dmeo"], "no such command 'dmeo'. Did you mean 'demo'? (see antgmm --help)"),
        (["--quick"], "no such option: --quick (see antgmm --help)"),
    ],
)
def test_usage_errors_are_one_line(refused, words, message):
    complaint = refused(*words)
    assert complaint.startswith(message)
    assert complaint.endswith(" --help)")


@pytest.mark.parametrize("words", [[], ["lab"]])
def test_a_group_without_a_command_shows_its_help(antgmm, words):
    result = antgmm(*words)
    assert "Commands" in result.output and "error: " not in result.output


def test_a_stopped_run_says_how_to_resume(antgmm, monkeypatch, teacher, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", stop)
    result = antgmm("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == ["stopped; run the same command to resume"]


@pytest.mark.parametrize(
    ("command", "goes_on"), [("experiments.lab.study.run.run_study", True), ("experiments.lab.bench.ratios.run", False)]
)
def test_a_stopped_measurement_says_whether_it_can_resume(antgmm, monkeypatch, tmp_path, command, goes_on):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, stop)
    monkeypatch.setattr("experiments.lab.study.arms.load_study", lambda path: None)
    words = ("study", "s.toml", "--run", "run", "--out", "o.json") if goes_on else ("bench",)
    result = antgmm("lab", *words)
    assert result.exit_code == 130
    _, last = result.stderr.splitlines()
    assert last == ("stopped; run the same command to resume" if goes_on else "stopped")


def test_a_failed_run_keeps_its_stages_and_says_how_to_resume(antgmm, monkeypatch, teacher, tmp_path):

    def fail(run):
        with run.folder.opened(run.recipe):
            (run.folder.path / "stages").mkdir()
            raise AntgmmError("the loss is not finite")

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", fail)
    result = antgmm("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert result.exit_code == 2
    assert "run the same command to resume" in result.stderr
    assert "error: the loss is not finite" in result.stderr
    assert (tmp_path / "run" / "stages").exists()
    assert "it is failed: the loss is not finite" in antgmm("report", "run").stderr


def test_a_full_disk_is_refused_in_one_line(refused, monkeypatch, teacher, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "run/x")

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", full)
    complaint = refused("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert complaint == "run/x: No space left on device; fix this and start again"


@pytest.mark.parametrize(
    "words",
    [
        ("cost", "--preset", "antgmm-tiny", "--batch", "9" * 400),
        ("package", "m", "--out", "o.stablehlo", "--width", "1000000000"),
        ("package", "m", "--out", "o.stablehlo", "--batch", "9" * 30),
    ],
)
def test_numbers_have_bounds_before_arrays_of_this_size_are_made(refused, words):
    complaint = refused(*words)
    assert "less than or equal to" in complaint or "is not in the range" in complaint


def test_a_terminal_without_a_width_gets_results(antgmm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert "parameters" in antgmm("cost", "--preset", "antgmm-tiny").stdout


def test_a_removed_current_folder_is_one_line(refused, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert refused("cost", "--preset", "antgmm-tiny") == "the current folder was removed: change to another one"


def test_a_batch_waits_less_than_a_request(refused):
    complaint = refused("serve", "m", "--wait-ms", "2000", "--timeout", "1")
    assert complaint == "--wait-ms 2000: a batch may not wait as long as a request, --timeout 1 s"


def test_json_has_no_numbers_that_json_does_not_have(antgmm):
    words = ("lab", "energy", "--watts", "inf", "--teacher-ms", "1", "--student-ms", "1", "--rate", "1", "--json")
    result = antgmm(*words)
    assert json.loads(result.stdout, parse_constant=pytest.fail)["teacher"]["joules"] is None


def test_a_model_beside_an_export_is_not_replaced_by_its_quantized_copy(refused, tmp_path):
    (tmp_path / "o-w8a8").mkdir()
    words = ("export", "s", "--like", "l", "--out", "o", "--data", "jsonl:x", "--quantize", "w8a8")
    assert refused(*words) == "o-w8a8 exists: choose another name or remove it"
