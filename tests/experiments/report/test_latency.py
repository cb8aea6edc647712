"""The energy of a request, measured over a loop of requests."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest

from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel.sharding import make_mesh
from data import maad
from data.record import Record
from experiments.auto.look import longest_answer
from experiments.auto.sizing import longest_request
from experiments.report import latency
from experiments.report.model_times import request_of
from experiments.run.host import metering
from experiments.run.host.energy import Energy
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava


def test_energy_per_request_is_the_loops_energy_over_the_requests(monkeypatch):
    requests = []

    @contextmanager
    def counted():
        yield lambda: Energy(len(requests) * 1e-6, 0.0, 1.0, "estimated", 1.0, 0.0, 0.0, [])

    def request():
        requests.append(1)
        return 0.1, 0.2, 0.3

    monkeypatch.setattr(metering, "metered", counted)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.0)
    consumed = latency.consumption(request, 7)
    assert len(requests) == consumed["requests"] == 7
    assert consumed["joules"] == pytest.approx(3.6) and consumed["kwh"] == pytest.approx(7e-6)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.05)
    assert latency.consumption(request, 1)["requests"] > 1


def test_figures_of_a_request_say_how_many_rounds_were_timed(monkeypatch):
    monkeypatch.setattr(latency, "jax_request", lambda *_: lambda: (0.001, 0.002, 0.003))
    monkeypatch.setattr(latency, "consumption", lambda request, repeats: {"joules": 1.0})
    figures = latency.in_jax({"student": latency.Served(None, {}, None, {})}, 5, 4)
    assert figures["student"]["rounds"] == 4
    assert figures["student"]["p50"] == pytest.approx(6) and figures["student"]["decode"] == pytest.approx(3)


def test_the_request_of_a_report_is_one_row_without_padding_on_a_mesh_too(tmp_path):
    directory = save_llava(tmp_path / "teacher")
    samples = Samples(maad.source("s", "test", 3), load_processor(directory), load_hf(directory)[0])
    alone = request_of(samples)
    with jax.set_mesh(make_mesh(data=2, fsdp=2)):
        jax.tree.map(np.testing.assert_array_equal, request_of(samples), alone)
    assert alone["input_ids"].shape == (1, samples.rows.index.prompt[0])
    assert alone["attention_mask"].all()


def test_a_request_has_the_image_slots_of_its_own_row(tmp_path):
    directory = save_llava(tmp_path / "teacher")
    image = np.zeros((16, 16, 3), np.uint8)
    records = [Record(images=(image,) * count, question="what" * count, answer="$5") for count in (1, 3, 2)]
    samples = Samples(records, load_processor(directory), load_hf(directory)[0])
    for row, count in enumerate((1, 3, 2)):
        request = request_of(samples, row)
        assert request["images"]["valid"].tolist() == [[True] * count]
        assert request["input_ids"].shape == (1, samples.rows.index.prompt[row])
    size, prompt = longest_request(samples)
    assert size == (samples.rows.index.prompt[1], longest_answer(samples), 3)
    jax.tree.map(np.testing.assert_array_equal, prompt, request_of(samples, 1))
