"""The comparison with peers: equal tasks and losses, figures by hand, resuming; no test asserts a speed."""

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
def written(work):
    """The figures of our three processes, which run inside this one."""
    with pytest.MonkeyPatch.context() as patch:
        # This setting would affect the whole test process.
        patch.setattr(ours, "keep_freed_memory", lambda: None)
        for mode in ("online", "build", "cached"):
            ours.main(work, work / f"{mode}.json", mode)
    return {mode: json.loads((work / f"{mode}.json").read_text()) for mode in ("online", "build", "cached")}


def llama(work, name):
    return transformers.LlamaForCausalLM.from_pretrained(work / "text" / name, dtype=torch.float32)


def reference_loss(student, teacher, batch):
    """Forward KL per answer token by PyTorch's models, one row at a time without padding."""
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
    batch = padded(replace(TASK, answer=(1, 3)), text, np.array([1, 0]), 5)
    assert batch["input_ids"].tolist() == [[5, 6, 4, 0, 0], [7, 8, 9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0], [1, 2, 0]]
    assert batch["targets"].tolist() == [[6, 4, -100], [9, 10, -100]]


def test_a_task_is_read_as_written(work):
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


def test_our_batches_follow_the_plan(work):
    task, text = read(work)
    stream = ours.stream(task, text)
    for rows, batch in zip(np.load(work / BUCKETED), planned(task, text, np.load(work / BUCKETED)), strict=True):
        mine = next(stream)
        assert (mine["index"] == rows).all()
        assert all((mine[name] == value).all() for name, value in batch.items())


def test_both_checkpoints_have_equal_logits(work):
    """Logits of PyTorch's Llama on unpadded rows equal ours on padded rows without picture slots."""
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


@pytest.mark.long
def test_our_losses_equal_pytorchs(work, written):
    """All losses of an epoch equal those of PyTorch's models, loss and AdamW."""
    losses = [step["loss"] for step in written["online"]["steps"]]
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
    assert len(losses) == task.steps
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_cached_and_online_teachers_give_equal_losses(written):
    online, build, cached = written["online"], written["build"], written["cached"]
    assert len(cached["steps"]) == 3 * len(online["steps"])
    losses = [[step["loss"] for step in figures["steps"][: TASK.steps]] for figures in (online, cached)]
    # The cache stores the states in bfloat16.
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)
    assert build["build_seconds"] > 0 and not build["steps"]
    # 16 samples, 5 answer positions, width 32, 2 bytes each. A cache of few batches ends a file after each batch, and
    # ArrayRecord pads files to two blocks of 64 KiB.
    assert 16 * 5 * 32 * 2 <= build["cache_bytes"] < 16 * 5 * 32 * 2 + (2 * TASK.steps + 1) * 65536
    for figures in (online, build, cached):
        assert 0 < figures["baseline_bytes"] <= figures["peak_bytes"]


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
    """Three rounds of 16 samples in 2 steps. Samples per second: TRL 8, 4 and 16, tunix 8, ours 16 and 80."""
    return {
        "trl": [record(seconds, matmul_flops_per_second=1e9) for seconds in (1.0, 2.0, 0.5)],
        "tunix": [record(1.0, peak_bytes=peak) for peak in (4000, 2000, 5000)],
        "tunix_bucketed": [record(0.8)] * 3,
        "ours_online": [record(0.5, peak_bytes=3000)] * 3,
        "ours_build": [record(0.0, (), build_seconds=2.0, cache_bytes=1600, peak_bytes=1500)] * 3,
        "ours_cached": [record(0.1, (1.0, 0.5) * 3)] * 3,
    }


@pytest.mark.long
def test_our_process_does_not_import_pytorch(work, written, tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.lab.peers.starting import start\n"
        "start('ours', Path(sys.argv[1]), Path(sys.argv[2]), 'online'); print('torch' in sys.modules)"
    )
    out = tmp_path / "out.json"
    printed = subprocess.run([sys.executable, "-c", code, work, out], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False"]
    losses = [[step["loss"] for step in one["steps"]] for one in (json.loads(out.read_text()), written["online"])]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_figures_by_hand(rounds):
    figures = summary.summary(rounds, 16)
    assert figures["contenders"]["trl"]["samples_per_second"] == pytest.approx({"median": 8, "low": 4, "high": 16})
    assert figures["contenders"]["ours_cached"]["samples_per_second"]["median"] == pytest.approx(80)
    ratios = figures["ratios"]
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
    # PyTorch's matmul is half as fast as JAX's; at equal speed TRL would reach 16 per second.
    assert figures["machine"]["jax_to_torch"]["median"] == pytest.approx(2)
    assert ratios["cached_to_trl_at_even_matmul"]["median"] == pytest.approx(5)
    cache = figures["cache"]
    assert cache["seconds_a_sample"]["median"] == pytest.approx(0.125) and cache["bytes_a_sample"] == 100
    # An epoch takes 2 s with TRL and tunix, 1 s online and 0.2 s cached.
    assert cache["epochs_to_pay"] == pytest.approx({"trl": 2 / 1.8, "tunix": 2 / 1.8, "ours_online": 2 / 0.8})
    assert summary.pays(2.0, 16, 100.0, [80.0]) is None


def test_aims_are_compared_with_figures(rounds):
    aims = {row[0]: row[1:] for row in summary.aims(summary.summary(rounds, 16)["ratios"])}
    assert aims["cached / TRL grouped, samples per second"] == ("10.00 (5.00 to 20.00)", ">= 8", "yes")
    assert aims["3 epochs with building the cache, TRL's time / ours"][2] == "no"
    assert aims["peak memory, cached / tunix"] == ("0.25 (0.20 to 0.50)", "< 0.5", "yes")


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


def test_smoothed_averages_over_previous_steps():
    assert results.smoothed([4.0, 2.0, 0.0, 4.0], 2) == [4.0, 3.0, 1.0, 2.0]


def test_a_recorder_records_every_step(tmp_path):
    recorder = Recorder("jax")
    recorder.ready()
    recorder.step(2.0)
    recorder.step(1.0)
    recorder.note(cache_bytes=7)
    recorder.write(tmp_path / "out.json", lambda: None, 8)
    recorded = json.loads((tmp_path / "out.json").read_text())
    assert [step["loss"] for step in recorded["steps"]] == [2.0, 1.0] and recorded["cache_bytes"] == 7
    assert recorded["versions"] == {"jax": jax.__version__} and recorded["rows"] == 8


def test_a_missing_environment_is_refused_with_a_remedy(refused, tmp_path):
    place = tmp_path / "nowhere" / "python"
    message = f"no environment with TRL and google-tunix at {place}: run `make peers-env` first"
    assert refused("lab", "peers", "--out", tmp_path / "out.json", "--python", place) == message


def test_a_comparison_resumes(tmp_path, monkeypatch):
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
    figures = run.run(TASK, work, repeats=2)
    assert before == ["0-trl", "0-tunix", "0-tunix_bucketed"] and len(started) == 9 and started[-1] == "1-ours_cached"
    assert figures["tunix"] == [{"name": "0-tunix"}, {}]
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
