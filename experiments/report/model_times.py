"""Latency of the models of a run, measured one model at a time."""

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.errors import AntgmmError, memory_error
from antgmm_jax.io.placed import on_first
from antgmm_jax.parallel.memory import device_memory
from antgmm_jax.parallel.processes import from_first_process, run_on_first
from experiments.report.latency import Served, in_jax, in_pytorch
from experiments.run.batch_size import compute_dtype
from experiments.run.export.in_torch import torch_device
from experiments.run.folder import RunFolder
from experiments.run.host.allocator import return_freed_memory
from experiments.run.host.console import say
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.student import Student, load_student
from pruning.costs import total_parameters

LATENCY_REPEATS = 30


def answer_length(test: Samples) -> int:
    """Returns the median length of the last answers in tokens, including the end token."""
    return int(np.median(test.rows.index.answer))


def latencies(
    folder: RunFolder, recipe: Recipe, teacher: Student, student: Student, test: Samples
) -> dict[str, dict[Any, Any]]:
    """Measures the latency of requests at batch 1, one model at a time; all processes of a run call it together.

    Stages are measured in JAX only, and PyTorch only if it runs both other models on the kind of device that JAX uses.

    Args:
        folder: folder of the run.
        recipe: recipe of the run.
        teacher: the teacher.
        student: the exported student.
        test: test records; `usual_row` of them is the request.

    Returns:
        engine -> "teacher", folder of a stage or "student" -> milliseconds by phase and energy of a request. Empty in
        processes other than the first, and where a model does not fit on one device.
    """
    dtype = timed_dtype(recipe)
    needed, free = jnp.dtype(dtype).itemsize * total_parameters(teacher.config), device_memory()
    if needed > free:
        sizes = f"{needed / 1e9:.3g} GB on one device, which has {free / 1e9:.3g}"
        say(f"latency is not measured: the teacher needs {sizes}")
        return {}
    try:
        return _measured(folder, recipe, teacher, student, test)
    except (AntgmmError, MemoryError, RuntimeError) as error:  # of the first process; the others get it as AntgmmError
        if (line := memory_error(error)) is None:
            raise
        say(f"latency is not measured: {str(line).partition(':')[0]} on one device")
        return {}


def _measured(
    folder: RunFolder, recipe: Recipe, teacher: Student, student: Student, test: Samples
) -> dict[str, dict[Any, Any]]:
    """Measures as `latencies`; raises the error of a device that has too little memory."""
    prompt, tokens, dtype = request_of(test, usual_row(test)), answer_length(test), timed_dtype(recipe)
    times: dict[str, dict[Any, Any]] = {"jax": {}, "torch": {}}
    models: dict[Any, tuple[Student, Any]] = {
        "teacher": (teacher, recipe.teacher.path),
        **{place: (load_student(place), None) for place in stages_of(folder, recipe)},
        "student": (student, folder.export),
    }
    in_torch = True
    for name, (model, directory) in models.items():
        served = Served(model.config, on_first(model.config, model.weights(), dtype), directory, prompt)
        times["jax"] |= run_on_first(partial(in_jax, {name: served}, tokens, LATENCY_REPEATS, dtype)) or {}
        served = served._replace(params={})  # PyTorch reads the files
        if directory is not None and in_torch:
            result = run_on_first(partial(_in_pytorch, name, served, tokens, dtype))
            in_torch = from_first_process(lambda result=result: bool(result))
            times["torch"] |= result or {}
        return_freed_memory()
    # Without one of the two models there is nothing to compare.
    return {engine: of for engine, of in times.items() if of and (engine == "jax" or in_torch)}


def _in_pytorch(name: str, served: Served, tokens: int, dtype: str) -> dict[str, Any]:
    """Measures a model in PyTorch; {} if that has not the kind of device that JAX uses, or too little memory."""
    import torch

    try:
        if not has_pytorch_device(total_parameters(served.config)):
            return {}
        return in_pytorch({name: served}, tokens, LATENCY_REPEATS, dtype)
    except (MemoryError, RuntimeError) as error:
        if memory_error(error) is None:
            raise
        say(f"latency in PyTorch is not measured: the {name} has too little memory")
        return {}
    finally:
        gc.collect()  # hooks of a model that was timed refer to it
        torch.cuda.empty_cache()  # else the next model may find too little free memory, and run on the CPU


def timed_dtype(recipe: Recipe) -> str:
    """Returns the dtype in which requests to the models of a run are timed: the one in which its export computes."""
    return compute_dtype(recipe.export.dtype)


def stages_of(folder: RunFolder, recipe: Recipe) -> list[Path]:
    """Returns the folders of the stages of a run."""
    return [folder.stage(number, stage.name) for number, stage in enumerate(recipe.stages, 1)]


def compared(times: Mapping[str, Mapping[Any, Any]], test: Samples, dtype: str) -> dict[str, Any]:
    """Selects the latency of teacher and student for the report.

    Args:
        times: from `latencies`.
        test: test records.
        dtype: dtype of computation.

    Returns:
        Milliseconds by engine, model and phase and the energy of a request, with the medians also as `<model>_ms` for
        scripts; the `prompt` tokens and image `slots` of the request, the answer length `tokens`, and `dtype`.
    """
    index, row = test.rows.index, usual_row(test)
    request = {"prompt": int(index.prompt[row]), "slots": int(index.slots[row]), "tokens": answer_length(test)}
    latency: dict[str, Any] = {**request, "dtype": dtype}
    for engine, models in times.items():
        pair = {name: models[name] for name in ("teacher", "student")}
        latency[engine] = {**pair, **{f"{name}_ms": figures["p50"] for name, figures in pair.items()}}
    return latency


def usual_row(samples: Samples) -> int:
    """Returns the row with the prompt length and number of image slots that are nearest to the medians of all rows."""
    index = samples.rows.index
    lengths = [np.asarray(values, float) for values in (index.prompt, index.slots)]
    distances = [np.abs(each - np.median(each)) / max(1.0, float(np.median(each))) for each in lengths]
    return int(np.sum(distances, axis=0).argmin())


def request_of(samples: Samples, row: int = 0) -> dict[str, Any]:
    """Returns a row as a request, {"images": ..., "input_ids": [1, T], ...}, without padding or unused image slots."""
    batch = samples.alone(row)
    return {"images": batch["images"], **{name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}}


def has_pytorch_device(parameters: int) -> bool:
    """Whether PyTorch would run a model on the kind of device that JAX uses, so that the two can be compared.

    Args:
        parameters: number of parameters of the model.
    """
    return (torch_device(4 * parameters) == "cuda") == (jax.default_backend() != "cpu")
