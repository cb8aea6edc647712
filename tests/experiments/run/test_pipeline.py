"""A whole run, and the same run killed several times: both end with identical arrays."""

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import from_dict
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import read_book, write_book
from data.maad import source
from experiments import cli
from experiments.commands import runs
from experiments.report import model_times
from experiments.report.write import finish
from experiments.run import pipeline
from experiments.run.cuts import segment_targets
from experiments.run.export import publishing as publish
from experiments.run.pipeline import Run
from experiments.run.progress.watching import Watch
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import load_student
from pruning.costs import total_parameters
from tests import reference
from tests.experiments.forks import forked_run
from tests.experiments.tiny import made_once, save_llava, save_teacher, write_recipe

RECIPE = """
seed = 3
calibration_batches = 1
checkpoint_every = 2
[teacher]
path = "{teacher}"
states = ["vision", "bridge", "encoder", "decoder"]
[data]
kind = "maad"
tier = "s"
samples = 24
[loss]
soft = 1.0
pair = 0.1
hidden = 0.1
vision = 0.1
[optimizer]
learning_rate = 1e-3
batch_size = 8
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 12
[evaluate.hard]
split = "test_hard"
samples = 9
[export]
dtype = "float32"
[[stage]]
name = "blocks"
segments = 1
mask_steps = 4
recover_steps = 4
importance = {{ "vision/*" = "block_influence", "*" = "taylor" }}
sizes = {{ "vision/layers" = 2, "decoder/layers" = 1 }}
[[stage]]
name = "widths"
segments = 2
mask_steps = 3
recover_steps = 1
sizes = {{ "vision/embed" = 16, "bridge/embed" = 16, "text/embed" = 24, "encoder/mlp" = 24, "vision/mlp" = 0.5 }}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    def write(folder):
        (folder / "recipe.toml").write_text(RECIPE.format(teacher=save_teacher(folder / "teacher")))

    return made_once(tmp_path_factory, "whole-recipe", write) / "recipe.toml"


def start(recipe: Path, run: Path, moment: str) -> int:
    # As many devices as in this process, because XLA's threads, and so its rounding, depend on their number.
    process = forked_run(str(recipe), str(run), moment, flags=os.environ["XLA_FLAGS"], count=jax.device_count())
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of the whole run, which no test changes, and its report."""

    def run(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)  # PyTorch is timed on devices like JAX's
            report = finish(Run(load_recipe(recipe), folder / "run"))
        (folder / "report.json").write_text(json.dumps(report))

    folder = made_once(tmp_path_factory, "whole-run", run)
    return folder / "run", json.loads((folder / "report.json").read_text())


@pytest.mark.long
def test_the_card_of_an_export_has_the_scores_of_the_report(whole):
    run, report = whole
    text = (run / "export" / "README.md").read_text()
    for key, data in (("scores", "val, 12"), ("scores_hard", "test_hard, 9")):
        assert f"Exact match on MAAD-synth, tier s, {data} questions, and ROUGE-L" in text
        values = (f"{report[model][key]['exact_match']:.3f}" for model in ("student", "teacher"))
        assert f"| mean over types | {' | '.join(values)} |" in text
    assert f"PyTorch was compared with JAX on {report['export']['prompts']} prompts: 100 % of the answers" in text
    assert "# run\n\nA vision-language model, pruned and distilled from `teacher` with antgmm-jax." in text
    assert "| `vision/layers` | 2 | 3 |" in text


def test_a_log_that_refuses_is_named_before_the_teachers_targets(recipe, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(AntgmmError, match="^--log wandb: no API key configured; correct this"):
        Run(load_recipe(recipe), tmp_path / "run", watch=Watch(["wandb"])).finish_stages()
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.long
def test_a_run_writes_stages_export_and_report(recipe, whole):
    run, report = whole
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert report["export"]["passed"] and report["export"]["answers_equal"] == 1.0
    assert report["export"]["max_abs_logit_diff"] <= 1e-5 * max(1.0, report["export"]["max_abs_logit"])
    student = load_student(run / "stages" / "02-widths")
    counts = sizes(student.config)
    wanted = {"vision/layers": 2, "decoder/layers": 1, "vision/embed": 16, "vision/heads": 1, "text/embed": 24}
    assert {axis: counts[axis] for axis in wanted} == wanted
    assert (counts["encoder/mlp"], counts["decoder/mlp"], counts["vision/mlp"]) == (24, 24, 24)
    assert [len(student.keep[axis]) for axis in ("vision/layers", "text/embed")] == [2, 24]
    assert not list((run / "steps").glob("*"))
    arrays = reference.reloaded(run / "export").state_dict()
    assert report["student"]["params"] == sum(a.numel() for name, a in arrays.items() if name not in TIED)
    assert {"teacher_ms", "student_ms"} <= report["latency"]["jax"].keys() & report["latency"]["torch"].keys()
    for name in ("teacher", "student"):
        scores = report[name]["scores_hard"]
        assert scores["count"] == 9 and scores["exact_match"] == report[name]["exact_match_hard"]
        assert scores["by_slice"].keys() == {record.slice for record in source("s", "test_hard", 9)}
    assert all(stage["latency"]["p50"] > 0 for stage in report["stages"])
    assert report["latency"]["dtype"] == "float32"


@pytest.mark.long
def test_a_run_reports_its_energy(whole):
    run, report = whole
    used, parts = report["energy"]["run"], [report["energy"]["cache"], *(stage["energy"] for stage in report["stages"])]
    assert sum(part["kwh"] for part in parts) < used["kwh"] and used["seconds"] < report["wall_seconds"]
    for number, stage in enumerate(report["stages"], 1):
        record = checkpoint.load_record(run / "stages" / f"{number:02d}-{stage['name']}")
        assert stage["energy"] == record["metrics"]["energy"]
    assert all(part["kwh"] > 0 and part["kg_co2"] > 0 for part in parts)
    for engine in ("jax", "torch"):
        requests = [report["latency"][engine][name]["energy"] for name in ("teacher", "student")]
        for request in requests:
            assert request["requests"] >= model_times.LATENCY_REPEATS
            assert request["joules"] * request["requests"] == pytest.approx(3.6e6 * request["kwh"])
        saved = report["energy"]["saved"][engine]
        assert saved["joules"] == requests[0]["joules"] - requests[1]["joules"]
        assert saved["kwh_a_year"]["100"] == pytest.approx(876 * saved["joules"])


@pytest.mark.long
def test_the_report_command_rebuilds_a_report(whole, tmp_path):
    report, run = whole[1], Path(shutil.copytree(whole[0], tmp_path / "run"))
    files = [run / "report" / name for name in ("report.md", "report.html")]
    before = [file.read_bytes() for file in files]
    measure = "ROUGE-L" if report["free_text"] else "macro exact match"
    assert f"points of {measure}" in before[0].decode()
    assert before[1].count(b"data:image/png;base64,") == len(report["examples"]) == 12
    for file in files:
        file.unlink()
    assert CliRunner().invoke(cli.app, ["report", str(run)]).exit_code == 0
    assert [file.read_bytes() for file in files] == before


TIED = {f"language_model.{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}


@pytest.mark.long
def test_a_run_killed_at_every_kind_of_moment_ends_with_the_same_arrays(recipe, whole, tmp_path):
    run = tmp_path / "killed"
    for moment in ("cache", "importance", "start"):
        assert start(recipe, run, moment) == -9, moment
    for moment in ("mask", "save", "recover", "scores", "second mask", "second segment", "export", "gate"):
        assert start(recipe, run, moment) == -9, moment
        saved = [path.parent for path in (run / "steps").glob("*/*/step.json")]
        saved += [path.parent for path in (run / "stages").glob("*/stage.json")]
        assert saved, f"nothing that was reported saved is left after {moment}"
        assert not (run / "export").exists()
        if moment == "save":
            _note_energy(run / "status.json", "01-blocks", kwh=50.0, seconds=1e6)
    assert start(recipe, run, "report") == -9 and (run / "export").exists()
    assert start(recipe, run, "never") == 0
    for name in ("01-blocks", "02-widths"):
        mine, theirs = (checkpoint.load_stage(folder / "stages" / name) for folder in (run, whole[0]))
        for left, right in zip(_leaves(mine[0]), _leaves(theirs[0]), strict=True):
            np.testing.assert_array_equal(left, right)
        assert mine[1]["keep"] == theirs[1]["keep"]
        assert mine[1]["metrics"]["history"] == theirs[1]["metrics"]["history"]
    # The energy of earlier attempts counts, in their own stage only.
    used = [checkpoint.load_record(stage)["metrics"]["energy"] for stage in sorted((run / "stages").iterdir())]
    assert 50.0 < used[0]["kwh"] < 50.1 and 1e6 < used[0]["seconds"] < 1.01e6
    assert 0.0 < used[1]["kwh"] < 0.1 and used[1]["seconds"] < 1e4
    assert json.loads((run / "report" / "report.json").read_text())["stages"][0]["energy"] == used[0]
    exports = [load_file(folder / "export" / "model.safetensors") for folder in (run, whole[0])]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        np.testing.assert_array_equal(tensor, exports[1][name])


@pytest.mark.long
def test_a_run_with_an_online_teacher_that_was_killed_ends_with_the_same_arrays(recipe, tmp_path):
    """The teacher is loaded again, and is not beside the scores."""
    first, _ = recipe.read_text().split('[[stage]]\nname = "widths"')
    (tmp_path / "recipe.toml").write_text(first.replace("[teacher]", '[teacher]\nmode = "online"'))
    assert start(tmp_path / "recipe.toml", tmp_path / "killed", "recover") == -9
    held, beside, scored = {id(array) for array in jax.live_arrays()}, [], pipeline.scored

    def noted(*arguments, **settings):
        gc.collect()
        arrays = [array for array in jax.live_arrays() if id(array) not in held]
        buffers = {array.unsafe_buffer_pointer(): array.size for array in arrays}  # shards of an array share its buffer
        beside.append(sum(buffers.values()) / total_parameters(arguments[1]))
        return scored(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "scored", noted)
        for run in ("killed", "whole"):
            Run(load_recipe(tmp_path / "recipe.toml"), tmp_path / run).finish_stages()
    assert max(beside) < 1.1  # only the student
    mine, theirs = (checkpoint.load_stage(tmp_path / run / "stages" / "01-blocks")[0] for run in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.long
def test_an_export_that_was_altered_is_refused(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    weights = run / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-64] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        AntgmmError, match=r"model\.safetensors was altered after it was saved; remove .*export and run"
    ):
        finish(Run(load_recipe(recipe), run), report=False)


@pytest.mark.long
def test_a_stage_of_another_run_is_refused(recipe, whole, tmp_path):
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    record = run / "stages" / "01-blocks" / "stage.json"
    write_book(record, {**read_book(record), "identity": "another"})
    with pytest.raises(AntgmmError, match=r"01-blocks is a stage of another run: remove it and start again"):
        finish(Run(load_recipe(recipe), run), report=False)


@pytest.mark.long
def test_an_edited_recipe_is_refused_also_if_it_is_edited_in_the_run(whole, tmp_path):
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("checkpoint_every = ", "checkpoint_every = 1"))
    with pytest.raises(AntgmmError, match="its recipe changed since its start: choose another folder or remove it"):
        finish(Run(load_recipe(run / "recipe.toml"), run), report=False)


@pytest.mark.long
def test_other_test_rows_are_refused(recipe, whole, tmp_path):
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    write_book(run / "inputs.json", {**read_book(run / "inputs.json"), "test_rows": "others"})
    with pytest.raises(AntgmmError, match="its test rows changed since its start: choose another folder"):
        finish(Run(load_recipe(recipe), run), report=False)


@pytest.mark.long
def test_a_report_can_be_left_out_and_made_later(recipe, whole, tmp_path, capsys):
    """Later, neither stages nor export are made again."""
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    (run / "report" / "report.json").unlink()
    assert finish(Run(load_recipe(recipe), run), report=False) == {}
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert not (run / "report" / "report.json").exists()
    written = {path: path.stat().st_mtime_ns for part in ("stages", "export") for path in (run / part).rglob("*")}
    for again in (False, True):
        runs.report(run, again=again, as_json=True)
        figures = json.loads(capsys.readouterr().out)
        assert {name: figures[name]["scores"] for name in ("teacher", "student")} == {
            name: whole[1][name]["scores"] for name in ("teacher", "student")
        }
        seconds = figures["wall_seconds"]
    assert seconds > whole[1]["wall_seconds"]
    assert written == {path: path.stat().st_mtime_ns for path in written}


def _note_energy(path, part, **changes):
    """Records energy of an attempt at a part, as a process does after a few seconds."""
    status = read_book(path)
    status["energy"][part] = {**status["energy"]["run"], **changes}
    write_book(path, status)


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


@pytest.mark.long
def test_a_student_that_answers_differently_fails_the_run(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "stages").parent.mkdir()
    for part in ("stages", "cache", "recipe.toml", "inputs.json"):
        (run / part).symlink_to(whole[0] / part)
    save = publish.save_hf

    def damaged(config, params, directory, **about):
        language = params["language"]
        norm = {**language["norm"], "scale": language["norm"]["scale"] * 1.01}
        save(config, {**params, "language": {**language, "norm": norm}}, directory, **about)

    # The files are complete but hold other numbers, which JAX and PyTorch would read equally.
    monkeypatch.setattr(publish, "save_hf", damaged)
    with pytest.raises(AntgmmError, match="export gate failed: logits of sample maad-s-0-val-"):
        finish(Run(load_recipe(recipe), run))
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "export gate failed" in status["error"]
    assert not (run / "export").exists()


@pytest.mark.long
def test_a_parent_of_another_teacher_is_refused(recipe, whole, tmp_path):
    tree, record = checkpoint.load_stage(whole[0] / "stages" / "01-blocks")
    checkpoint.save_stage(tmp_path / "parent", tree, {**record, "teacher": "another"})
    changes = [f'parent="{tmp_path / "parent"}"', "stage.blocks.sizes={}", "stage.blocks.mask_steps=0"]
    with pytest.raises(AntgmmError, match="parent .* was cut from another teacher than"):
        Run(load_recipe(recipe, changes), tmp_path / "run").scores()
    assert not (tmp_path / "run").exists()


def test_an_illegal_size_is_refused_before_anything_is_written(recipe, tmp_path):
    changed = load_recipe(recipe, ["stage.widths.sizes={'vision/embed' = 20}"])
    with pytest.raises(AntgmmError, match="stage 'widths'.*nearest legal sizes.*16.*32"):
        finish(Run(changed, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_segments_have_legal_sizes(recipe, whole):
    stage = load_recipe(recipe).stages[1]
    record = checkpoint.load_record(whole[0] / "stages" / "01-blocks")
    first, last = segment_targets(from_dict(record["config"]), stage)
    assert last == {"vision/embed": 16, "bridge/embed": 16, "text/embed": 24, "encoder/mlp": 24, "vision/mlp": 24}
    # Halfway from 32 to 16 is 24, which is not a multiple of a head's 16: the next larger legal size is 32.
    assert first == {"vision/embed": 32, "bridge/embed": 32, "text/embed": 28, "encoder/mlp": 36, "vision/mlp": 36}


@pytest.mark.long
def test_a_folder_of_another_recipe_is_refused(recipe, whole):
    with pytest.raises(AntgmmError, match="another recipe .*seed: 3 / 4"):
        finish(Run(load_recipe(recipe, ["seed=4"]), whole[0]))


@pytest.mark.long
def test_a_decoder_only_model_is_compressed_and_exported(tmp_path):
    vision = '"vision/layers" = 1, "vision/embed" = 16'
    cut = vision + ', "text/layers" = 2, "text/heads" = 1, "text/mlp" = 24, "text/embed" = 24'
    path = write_recipe(tmp_path / "r.toml", save_llava(tmp_path / "teacher"), name="all", sizes=cut)
    report = finish(Run(load_recipe(path), tmp_path / "run"))
    assert report["export"]["passed"] and report["export"]["answers_equal"] == 1.0
    config = reference.reloaded(tmp_path / "run" / "export").config
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (16, 1)
    text = config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (24, 2, 1, 8)
