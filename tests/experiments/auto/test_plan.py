"""Plans of `antgmm compress` without a recipe: written, kept, edited and run."""

import json
import re
import tomllib

import pytest
from PIL import Image

from antgmm_jax.io.convert import open_hf, save_hf
from experiments.auto import plan as planning
from experiments.auto import tune
from experiments.auto.goal import Goal
from experiments.auto.look import spread
from experiments.commands.goals import Wish
from experiments.run import batch_size
from experiments.run.export.schemes import Scheme
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import save_llava, save_qwen3_vl, save_smolvlm, save_teacher


def write_rows(file, count):
    """Rows of two types about random pictures."""
    folder = file.parent / "images"
    folder.mkdir(exist_ok=True)
    rows = []
    for row in range(count):
        Image.new("RGB", (32, 32), (row * 5 % 256, 0, 0)).save(folder / f"{row}.png")
        question, answer = [("what?", "a pill"), ("is it red?", "yes" if row % 4 else "no")][row % 2]
        kind = {"question": question, "answer": answer, "type": question[:2]}
        rows.append(json.dumps({"image": f"images/{row}.png", "id": f"{row}", **kind}) + "\n")
    file.write_text("".join(rows))
    return file


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 20)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("backend", "float16"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_accelerators_compute_in_bfloat16_unless_a_file_is_wider(monkeypatch, tmp_path, backend, float16, half):
    """The plan reads it from the files before it measures anything."""
    teacher = save_teacher(tmp_path / "teacher")
    if half:
        save_hf(*open_hf(teacher), tmp_path / "half", like=teacher, dtype="bfloat16")
    monkeypatch.setattr(batch_size.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(planning, "_amount", lambda goal, tables, place: seen.append(tables) or stop())
    seen: list[dict] = []

    def stop():
        raise KeyboardInterrupt

    for changes, expected in (((), float16 if half else "float32"), (("optimizer.dtype=float32",), "float32")):
        rows = {"kind": "jsonl", "path": "a.jsonl", "samples": 20}
        goal = Goal(str(tmp_path / ("half" if half else "teacher")), rows, rows, smaller=2.0, changes=changes)
        monkeypatch.setattr(planning, "counted", lambda table: table)
        with pytest.raises(KeyboardInterrupt):
            planning.measured(goal, tmp_path)
        assert seen.pop()["optimizer"].get("dtype", "float32") == expected


@pytest.mark.long
def test_one_command_plans_once_and_compresses(antgmm, monkeypatch, tmp_path, rows):
    for name, value in (("STEPS", 2), ("FEWEST", 2)):
        monkeypatch.setattr(tune, name, value)
    tried = []
    monkeypatch.setattr(tune, "spread", lambda records, most: (tried.append(most), spread(records, most))[1])
    words = ["compress", "--model", save_llava(tmp_path / "teacher"), "--data", rows, "--set", "seed=7"]
    left = [*words, "--params", "30000", "--set", "stage.settle.shift=0"]
    result = antgmm(*words, "--params", "30000", "--plan")
    assert result.exit_code == 0, result.output
    assert "warning: the teacher's answers score" in result.stderr
    assert "training rows are few" in result.stderr
    assert "held-out rows are few" in result.stderr
    assert result.stderr.count("held-out loss") == 6  # three trials, each when it ends and in the plan
    assert tried == [8]  # two steps of 4 rows, the same for all trials
    run, plan = tmp_path / "runs" / "teacher-30000", tmp_path / "runs" / "teacher-30000.toml"
    recipe = load_recipe(plan)
    assert [stage.name for stage in recipe.stages] == ["image", "language", "settle"]
    assert recipe.data.samples + recipe.evaluate.data.samples == 20
    assert recipe.seed == 7
    assert "give --set stage.settle.shift=0 to antgmm compress" in antgmm(*left, "--plan").stderr
    assert [path.name for path in plan.parent.iterdir()] == [plan.name]
    plan.write_text(re.sub("warmup = .*", "", re.sub("recover_steps = .*", "recover_steps = 3", plan.read_text())))
    result = antgmm(*words, "--params", "30000", "--no-report")
    assert result.exit_code == 0, result.output
    assert "is written already" in result.stderr
    assert load_recipe(run / "recipe.toml") == load_recipe(plan)
    assert [stage.steps for stage in load_recipe(plan).stages] == [3, 3, 3]
    assert json.loads((run / "report" / "gate.json").read_text())["passed"]
    other = antgmm(*words, "--params", "20000", "--run", run)
    assert other.stderr.endswith("choose another --run, or remove it with the run's folder\n")


@pytest.mark.long
@pytest.mark.parametrize("save", [save_smolvlm, save_qwen3_vl])
def test_bridges_that_merge_patches_and_rows_without_pictures(antgmm, tmp_path, save):
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    lines = map(json.loads, rows.read_text().splitlines())
    some = [{**line, "image": [] if row % 3 else line["image"]} for row, line in enumerate(lines)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in some))
    words = ["compress", "--model", save(tmp_path / "teacher"), "--data", rows, "--smaller", "2x", "--run", "run"]
    result = antgmm(*words, "--minutes", "0.01", "--no-report")
    assert result.exit_code == 0, result.output
    assert "stage 'image'" in result.stderr
    assert json.loads((tmp_path / "run" / "report" / "gate.json").read_text())["passed"]


@pytest.mark.long
def test_a_plan_without_time_reads_8_rows_tries_nothing_and_says_so(antgmm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    words = ["compress", "--model", save_llava(tmp_path / "teacher"), "--data", rows, "--params", "30000"]
    result = antgmm(*words, "--minutes", "0.01", "--plan", "--json")
    assert result.exit_code == 0, result.output
    plan = (tmp_path / "runs" / "teacher-30000.toml").read_text()
    assert json.loads(result.stdout) == {"path": "runs/teacher-30000.toml", "recipe": tomllib.loads(plan)}
    for text in (result.stderr, plan):
        assert re.search(r"sensitivity: measured on 8 of (16|24|32) rows", text)
        assert re.search(r"warning: with 8 rows for the sensitivity the plan takes \d+:\d\d more than a quarter", text)
        assert "tuning: none, for want of time or rows" in text
        assert re.search(r"plan and run take about \d+:\d\d, more than the 0.01 minutes: give at least --minutes", text)


def test_a_student_of_four_bits_is_planned_with_sizes_that_servers_have_kernels_for(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    wish = Wish("m", str(tmp_path / "rows.jsonl"), "", "8x", "", 0.0, "", 0.0)
    schemes = [None, Scheme.W8A8, Scheme.FP8, Scheme.W4A16]
    assert [wish.goal([], scheme).multiple for scheme in schemes] == [0, 0, 0, 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compress needs a RECIPE, or --model DIR --data FILE and a budget"),
        (["--model", "m"], "compress --model needs --data"),
        (["--model", "m", "--data", "d.jsonl"], "--params 10M, --latency-ms MS or --keep-quality 98%"),
        (["--model", "m", "--data", "d.jsonl", "--smaller", "8x", "--params", "9"], "needs one budget"),
        (["--model", "m", "--data", "d.jsonl", "--smaller", "0.5"], "--smaller 0.5: write how many times fewer"),
        (["--model", "m", "--data", "d.jsonl", "--keep-quality", "98"], "--keep-quality 98: write the share"),
        (["--model", "m", "--data", "d.jsonl", "--keep-quality", "98%"], "m/config.json is missing"),
        (["--model", "m", "--data", "d.jsonl", "--smaller", "8x"], "m/config.json is missing"),
        (["--model", "m", "--data", "d.csv", "--smaller", "8x"], "--data d.csv does not exist"),
        (["--model", "m", "--data", "d.jsonl", "--latency-ms", "inf"], "--latency-ms inf: write a number below 1e+06"),
        (["--model", "m", "--data", "d.jsonl", "--smaller", "8x", "--minutes", "inf"], "--minutes inf: write a number"),
        (
            ["--model", "m", "--data", "d.jsonl", "--smaller", "8x", "--set", "optimizer.batch_size=4"],
            "--set optimizer.batch_size: the plan decides it; write the plan with --plan, and edit it",
        ),
        (["r.toml", "--model", "m"], "RECIPE already says what to do: leave out --model"),
        (["r.toml", "--minutes", "3", "--keep-quality", "9%", "--plan"], "leave out --keep-quality, --minutes, --plan"),
        (
            ["--model", "m", "--data", "d.jsonl", "--smaller", "8x", "--set", "stage.images.recover_steps=4"],
            "--set stage.images: a plan has the stages image, language, settle",
        ),
        (["--model", "m", "--processes", "2", "--coordinator", "auto"], "several processes need a RECIPE"),
    ],
)
def test_what_is_missing_is_named_in_one_line(refused, tmp_path, words, message):
    assert message in refused("compress", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_no_model_meets_is_refused_before_anything_is_measured(refused, tmp_path, rows):
    words = ["compress", "--model", save_teacher(tmp_path / "teacher"), "--data", rows]
    assert re.search(
        r"no legal model has at most 100 parameters: the smallest has [\d,]+, [\d.]+ times fewer than the model;",
        refused(*words, "--params", "100"),
    )
    assert "no pruning is necessary: the model is within the budget" in refused(*words, "--params", "1000000000")
    assert not (tmp_path / "runs").exists()
