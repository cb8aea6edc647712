"""The latency of requests, where it is measured, and their energy, over a loop of requests."""

import weakref
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel import processes
from antgmm_jax.parallel.sharding import make_mesh
from data import maad
from data.record import Record
from experiments.auto.look import longest_answer
from experiments.auto.sizing import longest_request
from experiments.report import latency, model_times
from experiments.report.model_times import request_of
from experiments.run.folder import RunFolder
from experiments.run.host import metering
from experiments.run.host.energy import Energy
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import whole
from tests.experiments.tiny import save_llava, write_recipe

FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.\n[tf-allocator]"


def figures_of(models, *_):
    return {name: {"p50": 1.0} for name in models}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measures a teacher and a student, which is the teacher, without stages and without running them."""
    directory = save_llava(tmp_path / "teacher")
    samples = Samples(maad.source("s", "test", 3), load_processor(directory), load_hf(directory)[0])
    monkeypatch.setattr(model_times, "stages_of", lambda *_: [])
    monkeypatch.setattr(model_times, "in_jax", figures_of)
    monkeypatch.setattr(model_times, "in_pytorch", figures_of)
    monkeypatch.setattr(model_times, "torch_device", lambda nbytes: "cpu")
    recipe, teacher = load_recipe(write_recipe(tmp_path / "recipe.toml", directory)), whole(directory)
    return lambda: model_times.latencies(RunFolder(tmp_path / "run"), recipe, teacher, teacher, samples)


def failing(message):
    def fail(*_):
        raise RuntimeError(message)

    return fail


def test_a_report_is_without_times_where_a_model_does_not_fit_on_one_device(measure, monkeypatch, capsys):
    assert measure().keys() == {"jax", "torch"}
    monkeypatch.setattr(model_times, "in_jax", failing(FULL))
    assert measure() == {}
    assert "latency is not measured: not enough memory for 4096 bytes on one device\n" in capsys.readouterr().err
    monkeypatch.setattr(model_times, "device_memory", lambda: 1000)
    monkeypatch.setattr(model_times, "on_first", failing("the teacher is loaded"))
    assert measure() == {}
    assert "the teacher needs 0.000" in capsys.readouterr().err
    monkeypatch.setattr(model_times, "device_memory", lambda: 10**12)
    with pytest.raises(RuntimeError, match="the teacher is loaded"):
        measure()


@pytest.mark.parametrize("error", [f"JaxRuntimeError: {FULL}", "_ArrayMemoryError: Unable to allocate 2. GiB"])
def test_all_processes_leave_the_times_out_if_the_first_one_lacks_memory(measure, error, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "broadcast_from_first", lambda tree: tree)
    monkeypatch.setattr(processes, "_text", lambda text: f"the first process failed: {error}")
    assert measure() == {}


@pytest.mark.parametrize(
    ("devices", "engines"),
    [(["cpu", "cpu"], {"jax", "torch"}), (["cuda", "cuda"], {"jax"}), (["cpu", "cuda"], {"jax"})],
)
def test_pytorch_is_compared_only_if_it_runs_both_models_on_a_device_like_that_of_jax(
    measure, devices, engines, monkeypatch
):
    left = iter(devices)
    monkeypatch.setattr(model_times, "torch_device", lambda nbytes: next(left))
    times = measure()
    assert times.keys() == engines
    assert all(models.keys() == {"teacher", "student"} for models in times.values())


def test_a_model_without_room_in_pytorch_leaves_out_pytorch_alone(measure, monkeypatch):
    monkeypatch.setattr(model_times, "in_pytorch", failing("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert measure().keys() == {"jax"}
    monkeypatch.setattr(model_times, "in_pytorch", failing("another"))
    with pytest.raises(RuntimeError, match="another"):
        measure()


def test_memory_of_a_model_in_pytorch_is_free_before_the_next_one(measure, monkeypatch):
    models, alive = [], []

    class Model:
        def __init__(self):
            self.hook = lambda: self

    def timed(served, *_):
        models.append(weakref.ref(Model()))
        return figures_of(served)

    monkeypatch.setattr(model_times, "in_pytorch", timed)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(models[-1]() is not None))
    measure()
    assert alive == [False, False]


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
