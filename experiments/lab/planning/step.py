"""A distillation step compiled for simulated devices, without allocating arrays."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import distill
import pruning
from antgmm_jax.config import LMMConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from antgmm_jax.pure import abstract, functional
from experiments.lab.planning.chips import Chip
from experiments.lab.planning.collectives import sent
from experiments.run.random_batches import usual_image

DEVICES = 512
"""Maximum number of devices."""


class StepSpec(NamedTuple):
    """Specification of a distillation step.

    Attributes:
        student: config of the student: float32 parameters and AdamW moments, computed in bfloat16.
        teacher: config of the teacher, in bfloat16.
        batch: number of samples.
        length: prompt tokens per sample, including image tokens.
        answer: answer tokens per sample.
        remat: what the student's layers save for the backward pass.
    """

    student: LMMConfig
    teacher: LMMConfig
    batch: int
    length: int
    answer: int
    remat: Remat = "dots"


class Step(NamedTuple):
    """Cost of a step per device.

    Attributes:
        mesh: mesh axis -> devices.
        memory: kind -> bytes: `teacher`, `parameters`, `moments`, `batch` and `temporaries` (gradients, activations,
            gathered weights).
        flops: FLOPs of matrix products, without recomputation.
        traffic: minimum bytes of memory read or written: inputs once, parameters and moments and temporaries twice.
        sent: (operation, group size) -> bytes.
    """

    mesh: dict[str, int]
    memory: dict[str, int]
    flops: float
    traffic: float
    sent: Counter[tuple[str, int]]

    @property
    def total(self) -> int:
        """Total bytes of memory."""
        return sum(self.memory.values())


def check(spec: StepSpec) -> None:
    """Checks that a step is possible.

    Raises:
        AntgmmError: student and teacher have different images or tokens, or the prompt is too short for the image.
    """
    for name, one, other in (
        ("image side", spec.student.vision.image, spec.teacher.vision.image),
        ("vocabulary", spec.student.language.vocab, spec.teacher.language.vocab),
        ("number of image tokens", spec.student.usual_tokens, spec.teacher.usual_tokens),
    ):
        if one != other:
            raise AntgmmError(f"the student's {name} is {one}, the teacher's {other}: they must be equal")
    if spec.length <= spec.student.usual_tokens:
        raise AntgmmError(f"--length {spec.length}: the image alone takes {spec.student.usual_tokens} tokens")


def compiled(spec: StepSpec, mesh: Mapping[str, int]) -> Step:
    """Compiles the step for a mesh of simulated devices.

    The CPU compiler multiplies bfloat16 in float32 and widens the data that it sends, so temporaries and communication
    are up to twice as large as on an accelerator.

    Args:
        spec: the step.
        mesh: mesh axis -> devices.

    Returns:
        Cost per device.

    Raises:
        AntgmmError: the batch is not divisible by the mesh, or the mesh has more than DEVICES devices.
    """
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        step, arguments = _abstract(spec)
        # The program never runs, so it need not be optimised.
        program = step.lower(*arguments.values()).compile({"xla_backend_optimization_level": 0})
        kept = _kept(arguments)
    analysis, devices = program.memory_analysis(), math.prod(mesh.values())
    assert analysis is not None  # known for the CPU compiler
    # Outputs that do not reuse the buffers of donated inputs.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {**kept, "temporaries": analysis.temp_size_in_bytes + fresh}
    size = (spec.batch, spec.length, spec.answer)
    ahead, back = (sum(pruning.forward_flops(model, *size).values()) for model in (spec.teacher, spec.student))
    traffic = sum(kept.values()) + kept["parameters"] + kept["moments"] + 2 * memory["temporaries"]
    return Step(dict(mesh), memory, (ahead + 3 * back) / devices, traffic, sent(program.as_text(), devices))


def _abstract(spec: StepSpec) -> tuple[Any, dict[str, Any]]:
    """Returns the jitted step, and its arguments as shapes with sharding."""
    sharding.local_rows(spec.batch)  # raises if the batch is not divisible
    pure, big = functional(spec.student, spec.remat), functional(spec.teacher)
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    fresh = jax.eval_shape(lambda params: distill.init_state(params, optimizer), abstract(spec.student))
    frozen = sharding.place_tree(abstract(spec.teacher, jnp.bfloat16), big.axes)
    step = distill.make_step(
        pure,
        optimizer,
        distill.LossConfig(hard=0.5, soft=1.0, temperature=2.0),
        teacher=distill.online(big, frozen),
        dtype=jnp.bfloat16,
    )
    state = distill.shard_state(fresh, pure.axes, optimizer)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return step.program, {"state": state, "batch": dict(_batch(spec)), "gates": {}, "teacher": frozen, "rate": rate}


def _batch(spec: StepSpec) -> Iterator[tuple[str, Any]]:
    apart = spec.student.encoder_decoder
    prompt = spec.length if apart else spec.length + spec.answer
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("input_ids", "attention_mask"), (prompt,))
    shapes |= dict.fromkeys(("positions", "targets", *(["decoder_input_ids"] if apart else [])), (spec.answer,))
    where = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(sharding.RULES["batch"]))
    for name, shape in shapes.items():
        yield name, jax.ShapeDtypeStruct((spec.batch, *shape), jnp.int32, sharding=where)
    yield (
        "images",
        {
            name: jax.ShapeDtypeStruct((spec.batch, *leaf.shape), leaf.dtype, sharding=where)
            for name, leaf in usual_image(spec.student).items()
        },
    )


def _kept(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the step's arguments per device."""
    state = arguments["state"]
    kinds = {"teacher": arguments["teacher"], "parameters": state.params, "moments": state.opt_state}
    return {kind: _bytes(tree) for kind, tree in {**kinds, "batch": arguments["batch"]}.items()}


def _stays(spec: StepSpec, mesh: Mapping[str, int]) -> int:
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        return sum(_kept(_abstract(spec)[1]).values())


def _bytes(tree: Any) -> int:
    return sum(_part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)


def smallest(spec: StepSpec, refused: Mapping[str, int], memory: float) -> Step | None:
    """Finds the smallest mesh with enough memory by doubling `fsdp`.

    Args:
        spec: the step.
        refused: a mesh with too little memory, which is not compiled again; the result has the same `tensor`.
        memory: bytes of memory per device.

    Returns:
        The step; None if no mesh of at most DEVICES devices is sufficient.
    """
    fsdp, tensor = 1, refused["tensor"]
    while fsdp * tensor <= DEVICES and spec.batch % fsdp == 0:
        mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        # The size of the arguments is known without compiling, and rules out most meshes.
        if mesh != refused and _stays(spec, mesh) < memory and (step := compiled(spec, mesh)).total <= memory:
            return step
        fsdp *= 2
    return None


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
