"""The FLOPs and the request of a report are those of the test records, not of one picture of the usual size."""

from types import SimpleNamespace

import numpy as np
import pytest

from antgmm_jax.presets import preset
from data.record import Record
from data.source import InMemorySource
from experiments.auto import look
from experiments.report.figures import ABOVE, VARIED, energy_figures, export_figures, is_free_text, size_of
from experiments.report.model_times import compared, usual_row
from experiments.run.export.export_gate import GateResult
from experiments.run.host.energy import Energy


def records(*slots):
    index = SimpleNamespace(prompt=np.full(len(slots), 12), slots=np.array(slots), answer=np.full(len(slots), 3))
    return SimpleNamespace(rows=SimpleNamespace(index=index))


def test_flops_follow_the_image_slots_of_the_records():
    config = preset("llava-tiny")
    none, one, tiles = (size_of(config, records(*slots))["flops_by_phase"] for slots in ((0, 0), (1, 1), (2, 5)))
    assert none["vision"] == 0 and tiles["vision"] == 3.5 * one["vision"]
    assert none["prefill"] == one["prefill"] == tiles["prefill"]


def requests(prompt, slots):
    index = SimpleNamespace(prompt=np.array(prompt), slots=np.array(slots), answer=np.full(len(prompt), 3))
    return SimpleNamespace(rows=SimpleNamespace(index=index))


@pytest.mark.parametrize(
    ("prompt", "slots", "row"),
    [
        ([90, 20, 21, 22], [1, 1, 1, 1], 2),  # not the first row, and nearest to 21.5
        ([20, 20, 20], [9, 2, 1], 1),
        ([40, 21, 20], [1, 5, 1], 2),  # both count
        ([7, 5, 5], [0, 0, 0], 1),
    ],
)
def test_the_timed_request_is_a_usual_one(prompt, slots, row):
    samples = requests(prompt, slots)
    assert usual_row(samples) == row
    latency = compared({}, samples, "bfloat16")
    assert latency == {"prompt": prompt[row], "slots": slots[row], "tokens": 3, "dtype": "bfloat16"}


def test_energy_is_of_the_engines_that_were_timed():
    times = {name: {"p50": 1.0, "energy": {"joules": j}} for name, j in (("teacher", 3.0), ("student", 1.0))}
    latency = compared({"jax": times}, requests([5], [1]), "float32")
    used = {"run": Energy(0.1, 0.0, 1.0, "estimated", 1.0, 0.0, 0.0, [])}
    figures = energy_figures(SimpleNamespace(status=SimpleNamespace(energy=used)), latency)
    assert [*figures["saved"]] == ["jax"] and figures["saved"]["jax"]["joules"] == 2.0


def test_ties_of_the_export_gate_are_reported():
    gate = GateResult(0.1, 1.0, 0.0, 1.0, 8, True, "", ties=2)._asdict()
    assert export_figures(gate)["ties"] == 2
    assert export_figures({name: value for name, value in gate.items() if name != "ties"})["ties"] == 0


@pytest.mark.parametrize(
    ("answers", "exact_match", "free"),
    [
        (["red", "blue"] * 5, 0.09, False),  # a bad teacher of few answers
        (["a story"], 1.0, False),  # one record
        (["a story", "another", "a third"], 0.7, False),
        (["red", "blue"] * 5, 0.4, False),
        ([f"a story {n}" for n in range(9)] + ["a story 1"], 0.25, True),  # a fifth of the answers are equal
        ([f"a story {n}" for n in range(9)] + ["a story 1"], 0.35, False),
    ],
)
def test_free_text_is_told_by_the_answers_and_the_teacher(answers, exact_match, free):
    records = InMemorySource([Record(images=(), question="q", answer=answer, type="t") for answer in answers])
    assert (VARIED, ABOVE) == (look.VARIED, look.ABOVE)
    assert is_free_text(SimpleNamespace(records=records), {"exact_match": exact_match}) is free
