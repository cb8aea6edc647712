"""A distillation step compiled for devices that need not exist, without allocating arrays."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.axes import sizes
from antgmm_jax.config import IMAGE_SIDE, LMMConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from antgmm_jax.pure import abstract, functional
from distill.adapters import Ranks, adapted, shapes_with_adapters
from distill.align import selected
from distill.build import targets
from distill.cache import TeacherCache
from distill.records import dtype_of
from distill.teacher import PREFIX
from experiments.lab.planning import compilers, programs
from experiments.lab.planning.chips import CHIPS, Chip
from experiments.lab.planning.estimate import LINKS
from experiments.lab.planning.shapes import batch_shapes, image_tokens, mesh_for, model_shapes, row_sharding
from experiments.run.narrow import Narrow, with_dtypes
from experiments.run.progress.flops import pass_flops

DEVICES = 512
"""Maximum number of devices."""


class StepSpec(NamedTuple):
    """Specification of a distillation step.

    Attributes:
        student: config of the student, with float32 moments and parameters but for `narrow`.
        teacher: config of the teacher; None without one.
        batch: number of samples.
        length: prompt tokens per sample, including image tokens.
        answer: answer tokens per sample.
        remat: what the student's layers save for the backward pass.
        source: whether the teacher runs in the step, or its final states are read from a cache.
        dtype: dtype of computation, and of the teacher.
        micro_batches: number of parts of the batch that are computed one after another.
        loss: weights of the loss terms.
        states: states of the teacher that the losses read, as in `distill.build_cache`.
        optimizer: the optimizer; AdamW for None.
        features: whether the batch has image features in place of pixels.
        adapters: path prefix of parameters -> rank of their adapters, as in `distill.adapters`.
        narrow: path of a frozen parameter -> dtype of two bytes in which the state holds it.
        slots: image slots per sample; None for those of one image of the usual size.
    """

    student: LMMConfig
    teacher: LMMConfig | None
    batch: int
    length: int
    answer: int
    remat: Remat = "dots"
    source: Literal["online", "cache"] = "online"
    dtype: str = "bfloat16"
    micro_batches: int = 1
    loss: distill.LossConfig = distill.LossConfig(hard=0.5, soft=1.0, temperature=2.0)
    states: tuple[str, ...] = ("final",)
    optimizer: distill.Optimizer | None = None
    features: bool = False
    adapters: Ranks = MappingProxyType({})
    narrow: Narrow = MappingProxyType({})
    slots: int | None = None


class Step(NamedTuple):
    """Cost of a step per device.

    Attributes:
        mesh: mesh axis -> devices.
        memory: kind -> bytes: `teacher`, `parameters`, `moments`, `batch`, `temporaries` (gradients, activations,
            gathered weights) and `layout` (the program, and padding of arrays to the device's tiles).
        flops: FLOPs of matrix products, without recomputation.
        traffic: minimum bytes of memory read or written: inputs once, parameters and moments and temporaries twice.
        sent: (operation, group size) -> bytes; empty for a program that the compiler refuses, as it is too large.
        chip: chip that the step is compiled for; "" for CPUs.
        cycles: source operation -> cycles on a TPU (`estimate.cycles`); empty for others.
    """

    mesh: dict[str, int]
    memory: dict[str, int]
    flops: float
    traffic: float
    sent: Counter[tuple[str, int]]
    chip: str = ""
    cycles: Counter[str] = Counter()  # noqa: RUF012

    @property
    def total(self) -> int:
        """Total bytes of memory."""
        return sum(self.memory.values())

    @property
    def estimated(self) -> float | None:
        """Seconds on a TPU by its compiler's estimate, with kernels and waits for the links; None for other chips."""
        return sum(self.cycles.values()) / CHIPS[self.chip].clock if self.cycles else None

    @property
    def waits(self) -> float | None:
        """Seconds of `estimated` in which the device waits for the links."""
        if not self.cycles:
            return None
        return sum(n for source, n in self.cycles.items() if source.startswith(LINKS)) / CHIPS[self.chip].clock

    @property
    def share(self) -> float | None:
        """FLOPs per second of `estimated`, relative to the peak of the chip."""
        return None if self.estimated is None else self.flops / (CHIPS[self.chip].flops * self.estimated)


def check(spec: StepSpec) -> None:
    """Checks that a step is possible.

    Raises:
        AntgmmError: student and teacher have different images or tokens, or the prompt is too short for the image.
    """
    if spec.length <= (tokens := image_tokens(spec.student, spec.slots)):
        raise AntgmmError(f"--length {spec.length}: the images alone take {tokens} tokens")
    if spec.teacher is None:
        return
    for name, one, other in (
        ("image side", spec.student.vision.image, spec.teacher.vision.image),
        ("vocabulary", spec.student.language.vocab, spec.teacher.language.vocab),
        ("number of image tokens", spec.student.usual_tokens, spec.teacher.usual_tokens),
    ):
        if one != other:
            raise AntgmmError(f"the student's {name} is {one}, the teacher's {other}: they must be equal")


def compiled(spec: StepSpec, mesh: Mapping[str, int], chip: str = "") -> Step:
    """Compiles the step for a mesh.

    Args:
        spec: the step.
        mesh: mesh axis -> devices.
        chip: chip to compile for, with its own compiler; "" for CPUs: their compiler multiplies bfloat16 in float32 and
            widens the data that it sends, so temporaries and communication are up to twice those of an accelerator.

    Returns:
        Cost per device.

    Raises:
        AntgmmError: the batch is not divisible by the mesh, or there is no such slice.
    """
    devices = math.prod(mesh.values())
    with jax.set_mesh(mesh_for(mesh, chip)):
        step, arguments = _abstract(spec)
        kept = _kept(arguments)
        program = programs.compiled(step.lower(*arguments.values()), arguments, chip, devices)
    memory = {**kept, "temporaries": program.temporaries, "layout": program.layout}
    traffic = sum(kept.values()) + kept["parameters"] + kept["moments"] + 2 * program.temporaries
    flops = step_flops(spec) / devices
    return Step(dict(mesh), memory, flops, traffic, program.sent, chip, program.cycles)


def step_flops(spec: StepSpec) -> int:
    """Returns the FLOPs of a step on all devices: three passes of the student, and one of an online teacher."""
    lengths = {"length": spec.length, "answer": spec.answer, "slots": spec.slots}
    student = pass_flops(spec.student, spec.batch, **lengths)
    teacher = pass_flops(spec.teacher, spec.batch, **lengths) if spec.teacher and spec.source == "online" else {}
    # Losses on the image side alone do not run the language models.
    language = spec.loss.reads_answers or any(part.tower not in IMAGE_SIDE for part in _compared(spec))
    run = {*student, *teacher} if language else {*IMAGE_SIDE}
    trained = run - {*IMAGE_SIDE} if spec.features else run
    return 3 * _sum(student, trained) + _sum(teacher, run)


def _sum(flops: Mapping[str, int], towers: Collection[str]) -> int:
    return sum(count for tower, count in flops.items() if tower in towers)


def _abstract(spec: StepSpec) -> tuple[Any, dict[str, Any]]:
    """Returns the jitted step, and its arguments as shapes with sharding."""
    sharding.local_rows(spec.batch)  # raises if the batch is not divisible
    pure = adapted(functional(spec.student, spec.remat), spec.adapters)
    optimizer = spec.optimizer or distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    params = with_dtypes(shapes_with_adapters(abstract(spec.student), spec.adapters), spec.narrow)
    fresh = jax.eval_shape(lambda params: distill.init_state(params, optimizer), params)
    cached = _cached_shapes(spec)
    teacher = _teacher(spec, cached)
    step = distill.make_step(
        pure,
        optimizer,
        spec.loss,
        teacher=teacher,
        parts=_compared(spec),
        micro_batches=spec.micro_batches,
        dtype=jnp.dtype(spec.dtype),
    )
    state = distill.shard_state(fresh, pure.axes, optimizer)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    features = spec.dtype if spec.features else ""
    batch = dict(_batch(spec, spec.student, features=features))
    for name, shape in cached.items():
        rows = (spec.batch, *shape)
        batch[PREFIX + name] = jax.ShapeDtypeStruct(rows, dtype_of(name), sharding=row_sharding())
    return step.program, {"state": state, "batch": batch, "gates": {}, "teacher": teacher.params, "rate": rate}


def _batch(spec: StepSpec, model: LMMConfig, **more: str) -> Iterator[tuple[str, Any]]:
    return batch_shapes(model, spec.batch, spec.length, spec.answer, slots=spec.slots, **more)


def _teacher(spec: StepSpec, cached: dict[str, tuple[int, ...]]) -> distill.Teacher:
    """The teacher with shapes in place of its parameters."""
    if spec.teacher is None:
        return distill.NO_TEACHER
    big = functional(spec.teacher)
    frozen = model_shapes(spec.teacher, spec.dtype)
    if spec.source == "online":
        return distill.online(big, frozen)
    made: list[distill.Teacher] = []

    def head_of(params: Any) -> Any:
        held = TeacherCache(Path(), spec.batch, cached, lambda index: {})
        made.append(distill.cached(big, params, held))
        return made[0].params

    used = jax.eval_shape(head_of, frozen)
    # Equal shapes have equal axes here: the table of tokens and the head.
    placed = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(frozen)}
    held = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[leaf.shape]), used)
    return made[0]._replace(params=held)


def _cached_shapes(spec: StepSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a row of the teacher's states in a cache."""
    if spec.teacher is None or spec.source == "online":
        return {}
    batch = dict(_batch(spec, spec.teacher))
    run = partial(targets, functional(spec.teacher), names=spec.states)
    made = jax.eval_shape(run, abstract(spec.teacher), batch)
    return {name: made[name].shape[1:] for name in spec.states}


def _compared(spec: StepSpec) -> tuple[distill.Part, ...]:
    """The comparisons of states, with the first units of the teacher in place of the kept ones."""
    keep = {axis: np.arange(size) for axis, size in sizes(spec.student).items()}
    possible = tuple(part for part in distill.parts(spec.student, keep) if part.states in spec.states)
    return selected(spec.loss, possible)


def _kept(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the step's arguments per device."""
    state = arguments["state"]
    kinds = {"teacher": arguments["teacher"], "parameters": state.params, "moments": state.opt_state}
    return {kind: programs.bytes_of(tree) for kind, tree in {**kinds, "batch": arguments["batch"]}.items()}


def stays(spec: StepSpec, mesh: Mapping[str, int]) -> int:
    """Returns the bytes of a step's arguments on each device, without compiling it.

    Args:
        spec: the step.
        mesh: mesh axis -> devices.

    Raises:
        AntgmmError: the batch is not divisible by the mesh, or there are too few (simulated) devices.
    """
    with jax.set_mesh(mesh_for(mesh, "")):
        return sum(_kept(_abstract(spec)[1]).values())


def smallest(spec: StepSpec, refused: Mapping[str, int], memory: float, chip: str = "") -> Step | None:
    """Finds the smallest mesh with enough memory by doubling `fsdp`.

    Args:
        spec: the step.
        refused: a mesh with too little memory, which is not compiled again; the result has the same `tensor`.
        memory: bytes of memory per device.
        chip: chip to compile for; "" for CPUs.

    Returns:
        The step; None if no mesh of at most DEVICES devices is sufficient.
    """
    fsdp, tensor = 1, refused["tensor"]
    while fsdp * tensor <= DEVICES and spec.batch % fsdp == 0:
        mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        # The size of the arguments is known without compiling, and rules out most meshes.
        if mesh != refused and _possible(fsdp * tensor, chip) and stays(spec, mesh) < memory:
            step = compiled(spec, mesh, chip)
            if step.total <= memory:
                return step
        fsdp *= 2
    return None


def _possible(devices: int, chip: str) -> bool:
    """Whether there is a slice of this size."""
    try:
        return not chip or bool(compilers.slice_of(chip, devices))
    except AntgmmError:
        return False


def roofline(step: Step, chip: Chip) -> dict[str, float]:
    """Returns lower bounds of the time of a step on a chip.

    Args:
        step: from `compiled`.
        chip: the chip.

    Returns:
        Seconds for `compute`, `memory` and `links`; with perfect overlap, a step takes the largest of them.
    """
    devices, seconds = math.prod(step.mesh.values()), 0.0
    for (_, group), size in step.sent.items():
        # Devices of a tensor group are neighbours; in a mesh larger than an island, other groups cross islands.
        near = devices <= chip.island or group <= min(step.mesh.get("tensor", 1), chip.island)
        seconds += size / (chip.link if near else chip.network)
    return {"compute": step.flops / chip.flops, "memory": step.traffic / chip.bandwidth, "links": seconds}
