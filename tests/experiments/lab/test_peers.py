"""The comparison with peers: one task and loss for all, figures by hand, resume; how fast it is, no test says."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from antgmm_jax.errors import AntgmmError
from experiments.lab.peers import ours, results
from experiments.lab.peers import runs as run
from experiments.lab.peers import summaries as summary
from experiments.lab.peers.preparation import batch_of, prepare
from experiments.lab.peers.record import Recorder
from experiments.lab.peers.task import BUCKETED, Task, Text, draw, in_order, padded, planned, read

TASK = Task(
    rows=16,
    batch=4,
    vocab=64,
    student=(2, 16, 2, 24),
    teacher=(2, 32, 2, 48),
    prompt=(3, 12),
    answer=(2, 5),
    multiple=12,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "work"
    prepare(TASK, folder)
    return folder


@pytest.fixture(scope="module")
def told(work):
    """What our three processes write, each run here."""
    with pytest.MonkeyPatch.context() as patch:
        # A setting of the whole process, which is not this file's own.
        patch.setattr(ours, "keep_freed_memory", lambda: None)
        for mode in ("online", "build", "cached"):
            ours.main(work, work / f"{mode}.json", mode)
    return {mode: json.loads((work / f"{mode}.json").read_text()) for mode in ("online", "build", "cached")}


def llama(work, name):
    return transformers.LlamaForCausalLM.from_pretrained(work / "text" / name, dtype=torch.float32)


def reference_loss(student, teacher, batch):
    """Forward KL a token over the answers, from PyTorch's models on rows without any padding."""
    total, count = 0.0, 0
    for ids, mask, positions, targets in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "positions", "targets")), strict=True
    ):
        row = torch.tensor(ids[: mask.sum()])[None].long()
        at = positions[targets >= 0]
        with torch.no_grad():
            theirs = torch.log_softmax(teacher(row).logits[0, at], -1)
        mine = torch.log_softmax(student(row).logits[0, at], -1)
        total, count = total + (theirs.exp() * (theirs - mine)).sum(), count + len(at)
    return total / count


def test_text_is_seeded_and_within_its_lengths():
    text, again = draw(TASK), draw(TASK)
    assert all((a == b).all() for a, b in zip(text.ids, again.ids, strict=True))
    assert not np.array_equal(draw(replace(TASK, seed=1)).lengths, text.lengths)
    answers = text.lengths - text.prompts
    assert text.prompts.min() >= 3 and text.prompts.max() <= 12 and answers.min() >= 2 and answers.max() <= 5
    assert min(row.min() for row in text.ids) >= 4 and max(row.max() for row in text.ids) < 64


def test_padded_rows_name_the_logits_that_predict_the_answer():
    text = Text([np.array([7, 8, 9, 10]), np.array([5, 6, 4])], np.array([2, 1]))
    found = padded(replace(TASK, answer=(1, 3)), text, np.array([1, 0]), 5)
    assert found["input_ids"].tolist() == [[5, 6, 4, 0, 0], [7, 8, 9, 10, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert found["positions"].tolist() == [[0, 1, 0], [1, 2, 0]]
    assert found["targets"].tolist() == [[6, 4, -100], [9, 10, -100]]


def test_what_is_written_is_read_back(work):
    task, text = read(work)
    assert task == TASK
    drawn = draw(TASK)
    assert (text.prompts == drawn.prompts).all()
    assert all((a == b).all() for a, b in zip(text.ids, drawn.ids, strict=True))


def test_a_plan_visits_every_row_once_and_pads_to_the_multiple(work):
    task, text = read(work)
    for plan in (in_order(task), np.load(work / BUCKETED)):
        assert sorted(plan.flatten().tolist()) == list(range(16))
        for rows, batch in zip(plan, planned(task, text, plan), strict=True):
            longest = text.lengths[rows].max()
            assert batch["input_ids"].shape[1] - 12 < longest <= batch["input_ids"].shape[1]
            assert (batch["attention_mask"].sum(axis=1) == text.lengths[rows]).all()


def test_our_batches_are_those_that_the_plan_holds(work):
    task, text = read(work)
    stream = ours.stream(task, text)
    for rows, batch in zip(np.load(work / BUCKETED), planned(task, text, np.load(work / BUCKETED)), strict=True):
        mine = next(stream)
        assert (mine["index"] == rows).all()
        assert all((mine[name] == value).all() for name, value in batch.items())


def test_both_checkpoints_are_one_model(work):
    """PyTorch's Llama, on rows without padding, and our engine, on padded ones without a picture slot."""
    task, text = read(work)
    batch = batch_of(task, text, np.arange(4), task.widths[-1])
    for name in ("student", "teacher"):
        config, params = ours.load_hf(work / "ours" / name)
        mine = np.asarray(ours.functional(config).apply(jax.tree.map(np.asarray, params), batch)["logits"])
        model = llama(work, name)
        for row in range(4):
            with torch.no_grad():
                theirs = model(torch.tensor(text.ids[row])[None].long()).logits[0].numpy()
            np.testing.assert_allclose(mine[row, : len(theirs)], theirs, atol=1e-5)


def test_our_steps_are_pytorchs(work, told):
    """Every loss of an epoch, against PyTorch's models, loss and AdamW."""
    found = [step["loss"] for step in told["online"]["steps"]]
    task, text = read(work)
    student, teacher = llama(work, "student"), llama(work, "teacher")
    decayed = [p for p in student.parameters() if p.ndim > 1]
    spared = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": task.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=task.learning_rate)
    expected = []
    for batch in planned(task, text, np.load(work / BUCKETED)):
        loss = reference_loss(student, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(found) == task.steps
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_cached_teacher_gives_the_online_ones_losses(told):
    online, build, cached = told["online"], told["build"], told["cached"]
    assert len(cached["steps"]) == 3 * len(online["steps"])
    losses = [[step["loss"] for step in found["steps"][: TASK.steps]] for found in (online, cached)]
    # The cache keeps bfloat16: 8 bits of the states.
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)
    assert build["build_seconds"] > 0 and not build["steps"]
    # 16 samples, 5 answer positions, 32 wide, 2 bytes each, and the file's own: ArrayRecord ends on a block of 64 KiB.
    assert 16 * 5 * 32 * 2 <= build["cache_bytes"] < 16 * 5 * 32 * 2 + 3 * 65536
    for found in (online, build, cached):
        assert 0 < found["baseline_bytes"] <= found["peak_bytes"]


def record(seconds, losses=(1.0, 0.5), **more):
    return {
        "versions": {"jax": "1"},
        "rows": 8,
        "baseline_bytes": 100,
        "peak_bytes": 1000,
        "setup_seconds": 3.0,
        "matmul_flops_per_second": 2e9,
        "steps": [{"seconds": seconds, "loss": loss} for loss in losses],
        **more,
    }


@pytest.fixture
def rounds():
    """Three rounds; 16 samples take 2 steps. TRL at 8, 4 and 16 a second, tunix at 8, ours at 16 and 80."""
    return {
        "trl": [record(seconds, matmul_flops_per_second=1e9) for seconds in (1.0, 2.0, 0.5)],
        "tunix": [record(1.0, peak_bytes=peak) for peak in (4000, 2000, 5000)],
        "tunix_bucketed": [record(0.8)] * 3,
        "ours_online": [record(0.5, peak_bytes=3000)] * 3,
        "ours_build": [record(0.0, (), build_seconds=2.0, cache_bytes=1600, peak_bytes=1500)] * 3,
        "ours_cached": [record(0.1, (1.0, 0.5) * 3)] * 3,
    }


def test_a_process_of_ours_does_without_pytorch(work, told, tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.lab.peers.starting import start\n"
        "start('ours', Path(sys.argv[1]), Path(sys.argv[2]), 'online'); print('torch' in sys.modules)"
    )
    out = tmp_path / "out.json"
    printed = subprocess.run([sys.executable, "-c", code, work, out], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False"]
    losses = [[step["loss"] for step in figures["steps"]] for figures in (json.loads(out.read_text()), told["online"])]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_figures_are_those_worked_out_by_hand(rounds):
    found = summary.summary(rounds, 16)
    assert found["contenders"]["trl"]["samples_per_second"] == pytest.approx({"median": 8, "low": 4, "high": 16})
    assert found["contenders"]["ours_cached"]["samples_per_second"]["median"] == pytest.approx(80)
    ratios = found["ratios"]
    assert ratios["cached_to_trl"] == pytest.approx({"median": 10, "low": 5, "high": 20})
    assert ratios["cached_to_tunix"]["median"] == pytest.approx(10)
    # Three epochs: TRL 6, 12 and 3 s; ours 2 s for the cache and 3 x 0.2 s.
    assert ratios["cached_to_trl_whole"] == pytest.approx({"median": 6 / 2.6, "low": 3 / 2.6, "high": 12 / 2.6})
    assert ratios["cached_to_tunix_whole"]["median"] == pytest.approx(6 / 2.6)
    assert ratios["online_to_tunix"]["median"] == pytest.approx(2)
    assert ratios["online_to_tunix_bucketed"]["median"] == pytest.approx(1.6)
    assert ratios["memory_cached_to_tunix"] == pytest.approx({"median": 0.25, "low": 0.2, "high": 0.5})
    assert ratios["memory_with_building_to_tunix"]["median"] == pytest.approx(1500 / 4000)
    assert ratios["memory_online_to_tunix"]["median"] == pytest.approx(0.75)
    # torch's matmul is half as fast as JAX's: at an even one TRL would do 16 a second.
    assert found["machine"]["jax_to_torch"]["median"] == pytest.approx(2)
    assert ratios["cached_to_trl_at_even_matmul"]["median"] == pytest.approx(5)
    cache = found["cache"]
    assert cache["seconds_a_sample"]["median"] == pytest.approx(0.125) and cache["bytes_a_sample"] == 100
    # An epoch takes 2 s with TRL and tunix, 1 s online and 0.2 s cached.
    assert cache["epochs_to_pay"] == pytest.approx({"trl": 2 / 1.8, "tunix": 2 / 1.8, "ours_online": 2 / 0.8})
    assert summary.pays(2.0, 16, 100.0, [80.0]) is None


def test_aims_are_met_or_not(rounds):
    found = {row[0]: row[1:] for row in summary.aims(summary.summary(rounds, 16)["ratios"])}
    assert found["cached / TRL grouped, samples per second"] == ("10.00 (5.00 to 20.00)", ">= 8", "yes")
    assert found["3 epochs with building the cache, TRL's time / ours"][2] == "no"
    assert found["peak memory, cached / tunix"] == ("0.25 (0.20 to 0.50)", "< 0.5", "yes")


def test_files_are_written(rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "run", lambda *_, **__: rounds)
    out = tmp_path / "peers.json"
    results.compare(replace(TASK, rows=16), tmp_path, out, python=tmp_path, repeats=3)
    figures = json.loads(out.read_text())
    assert figures["rounds"]["trl"][1]["samples_per_second"] == pytest.approx(4) and figures["task"]["rows"] == 16
    assert "| TRL GKD, grouped by length | 8.0 (4.0 to 16.0) |" in out.with_suffix(".md").read_text()
    drawn = out.with_suffix(".svg").read_text()
    results.plot(figures, out.with_suffix(".svg"))
    assert out.with_suffix(".svg").read_text() == drawn


def test_a_curve_is_averaged_over_the_steps_before():
    assert results.smoothed([4.0, 2.0, 0.0, 4.0], 2) == [4.0, 3.0, 1.0, 2.0]


def test_a_recorder_gives_each_step_its_seconds(tmp_path):
    recorder = Recorder("jax")
    recorder.ready()
    recorder.step(2.0)
    recorder.step(1.0)
    recorder.note(cache_bytes=7)
    recorder.write(tmp_path / "out.json", lambda: None, 8)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [step["loss"] for step in found["steps"]] == [2.0, 1.0] and found["cache_bytes"] == 7
    assert found["versions"] == {"jax": jax.__version__} and found["rows"] == 8


def test_without_the_environment_the_remedy_is_told(refused, tmp_path):
    place = tmp_path / "nowhere" / "python"
    message = f"no environment with TRL and google-tunix at {place}: run `make peers-env` first"
    assert refused("lab", "peers", "--out", tmp_path / "out.json", "--python", place) == message


def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "check_environment", lambda python: None)
    started, work = [], tmp_path / "work"

    def start(name, work, out, python):
        if len(started) == 3:
            raise AntgmmError("stopped")
        started.append(out.stem)
        out.write_text(json.dumps({"name": out.stem}))

    monkeypatch.setattr(run, "_start", start)
    with pytest.raises(AntgmmError, match="stopped"):
        run.run(TASK, work, repeats=2)
    before, started = started, []
    monkeypatch.setattr(run, "_start", lambda *a: (started.append(a[2].stem), a[2].write_text(json.dumps({}))))
    found = run.run(TASK, work, repeats=2)
    assert before == ["0-trl", "0-tunix", "0-tunix_bucketed"] and len(started) == 9 and started[-1] == "1-ours_cached"
    assert found["tunix"] == [{"name": "0-tunix"}, {}]
    with pytest.raises(AntgmmError, match="other settings: remove it or choose another --work"):
        run.run(replace(TASK, seed=5), work, repeats=2)


def test_a_contender_that_fails_is_named_with_its_log(tmp_path):
    python, out = tmp_path / "python", tmp_path / "0-trl.json"
    python.write_text("#!/bin/sh\necho early\necho it broke\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(AntgmmError) as caught:
        run._start("trl", tmp_path, out, python)
    log = tmp_path / "0-trl.log"
    assert str(caught.value) == f"TRL GKD, grouped by length ended with code 3: it broke; see {log}"
    assert log.read_text() == "early\nit broke\n"
