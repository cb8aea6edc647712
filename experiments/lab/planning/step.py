"""A distillation step compiled ahead of time for devices that are only simulated: nothing is allocated."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import distill
import pruning
from antgmm_jax import sharding
from antgmm_jax.config import LMMConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import abstract, functional
from experiments.lab.planning.chips import Chip
from experiments.lab.planning.collectives import sent

DEVICES = 512
"""The most devices that a plan is made for."""


class Asked(NamedTuple):
    """A step: who learns from whom, and from how much.

    Attributes:
        student: the model that is trained: float32 parameters and AdamW's moments, computed in bfloat16.
        teacher: the model that runs beside it, in bfloat16.
        batch: samples.
        length: prompt tokens of each, the picture's included.
        answer: answer tokens of each.
        remat: what the student's layers keep for the backward pass.
    """

    student: LMMConfig
    teacher: LMMConfig
    batch: int
    length: int
    answer: int
    remat: Remat = "dots"


class Step(NamedTuple):
    """What a step takes on each device.

    Attributes:
        mesh: mesh axis -> devices.
        memory: kind -> bytes: `teacher`, `parameters`, `moments`, `batch` and `temporaries` (gradients, activations,
            gathered weights).
        flops: of the matrix products that the models need; what is computed twice to save memory is not counted.
        traffic: bytes of device memory that are read or written at least: what stays once, temporaries twice.
        sent: (operation, group size) -> bytes.
    """

    mesh: dict[str, int]
    memory: dict[str, int]
    flops: float
    traffic: float
    sent: Counter[tuple[str, int]]

    @property
    def total(self) -> int:
        """Bytes of memory in all."""
        return sum(self.memory.values())


def check(asked: Asked) -> None:
    """Refuses a step that no mesh can run.

    Raises:
        AntgmmError: models that read different pictures or tokens, or a prompt without room for the picture.
    """
    for name, one, other in (
        ("pictures of side", asked.student.vision.image, asked.teacher.vision.image),
        ("tables of tokens", asked.student.language.vocab, asked.teacher.language.vocab),
        ("image tokens", asked.student.image_tokens, asked.teacher.image_tokens),
    ):
        if one != other:
            raise AntgmmError(f"the student's {name} are {one}, the teacher's {other}: a student reads what it did")
    if asked.length <= asked.student.image_tokens:
        raise AntgmmError(f"--length {asked.length}: the picture alone takes {asked.student.image_tokens} tokens")


def compiled(asked: Asked, mesh: Mapping[str, int]) -> Step:
    """Compiles the step for a mesh of simulated devices.

    The CPU's compiler computes products of bfloat16 in float32 and widens what it sends for them, so temporaries
    and bytes sent are those of a program that is up to twice as large.

    Args:
        asked: the step.
        mesh: mesh axis -> devices.

    Returns:
        What it takes.

    Raises:
        AntgmmError: a batch that does not divide, or a mesh of more than DEVICES.
    """
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        step, arguments = _abstract(asked)
        # The program never runs, so its machine code need not be good.
        program = step.lower(*arguments.values()).compile({"xla_backend_optimization_level": 0})
        kept = _kept(arguments)
    found, devices = program.memory_analysis(), math.prod(mesh.values())
    assert found is not None  # the CPU's compiler always tells
    # What a step returns beside the state that it was given and gives back.
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    memory = {**kept, "temporaries": found.temp_size_in_bytes + fresh}
    size = (asked.batch, asked.length, asked.answer)
    ahead, back = (sum(pruning.forward_flops(model, *size).values()) for model in (asked.teacher, asked.student))
    traffic = sum(kept.values()) + kept["parameters"] + kept["moments"] + 2 * memory["temporaries"]
    return Step(dict(mesh), memory, (ahead + 3 * back) / devices, traffic, sent(program.as_text(), devices))


def _abstract(asked: Asked) -> tuple[Any, dict[str, Any]]:
    """The jitted step, and its arguments as shapes that say where they lie."""
    sharding.own_rows(asked.batch)  # refuses what does not divide
    pure, big = functional(asked.student, asked.remat), functional(asked.teacher)
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    fresh = jax.eval_shape(lambda params: distill.init_state(params, optimizer), abstract(asked.student))
    frozen = sharding.lay(abstract(asked.teacher, jnp.bfloat16), big.axes)
    step = distill.make_step(
        pure,
        optimizer,
        distill.LossConfig(hard=0.5, soft=1.0, temperature=2.0),
        teacher=distill.online(big, frozen),
        dtype=jnp.bfloat16,
    )
    state = distill.lay_out(fresh, pure.axes, optimizer)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return step.program, {"state": state, "batch": dict(_batch(asked)), "gates": {}, "teacher": frozen, "rate": rate}


def _batch(asked: Asked) -> Iterator[tuple[str, Any]]:
    vision, apart = asked.student.vision, asked.student.encoder_decoder
    prompt = asked.length if apart else asked.length + asked.answer
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("input_ids", "attention_mask"), (prompt,))
    shapes |= dict.fromkeys(("positions", "targets", *(["decoder_input_ids"] if apart else [])), (asked.answer,))
    where = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(sharding.RULES["batch"]))
    for name, shape in shapes.items():
        yield name, jax.ShapeDtypeStruct((asked.batch, *shape), jnp.int32, sharding=where)
    images = {
        "pixels": ((vision.image, vision.image, vision.channels), jnp.uint8),
        "scale": ((vision.channels,), jnp.float32),
        "offset": ((vision.channels,), jnp.float32),
        "valid": ((), jnp.bool_),
    }
    yield (
        "images",
        {
            name: jax.ShapeDtypeStruct((asked.batch, 1, *shape), dtype, sharding=where)
            for name, (shape, dtype) in images.items()
        },
    )


def _kept(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a device's parts of what a step is given."""
    state = arguments["state"]
    kinds = {"teacher": arguments["teacher"], "parameters": state.params, "moments": state.opt_state}
    return {kind: _bytes(tree) for kind, tree in {**kinds, "batch": arguments["batch"]}.items()}


def _stays(asked: Asked, mesh: Mapping[str, int]) -> int:
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        return sum(_kept(_abstract(asked)[1]).values())


def _bytes(tree: Any) -> int:
    return sum(_part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)


def smallest(asked: Asked, refused: Mapping[str, int], memory: float) -> Step | None:
    """The step on the smallest mesh that it fits, `fsdp` doubled until it does.

    Args:
        asked: the step.
        refused: a mesh that it does not fit, which is not compiled again; its `tensor` is kept.
        memory: bytes of a device.

    Returns:
        The step; None where no mesh of at most DEVICES is enough.
    """
    fsdp, tensor = 1, refused["tensor"]
    while fsdp * tensor <= DEVICES and asked.batch % fsdp == 0:
        mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        # What stays is known without compiling, and most meshes that are too small are so by that alone.
        if mesh != refused and _stays(asked, mesh) < memory and (step := compiled(asked, mesh)).total <= memory:
            return step
        fsdp *= 2
    return None


def roofline(step: Step, chip: Chip) -> dict[str, float]:
    """Seconds that a step takes at least on a chip, by what bounds it.

    Args:
        step: from `compiled`.
        chip: the chip.

    Returns:
        `compute`, `memory` and `links`; perfectly overlapped, a step takes the largest of them.
    """
    devices, seconds = math.prod(step.mesh.values()), 0.0
    for (_, group), size in step.sent.items():
        # Devices of one tensor group are neighbours; any other group of a large mesh leaves the island.
        near = devices <= chip.island or group <= min(step.mesh.get("tensor", 1), chip.island)
        seconds += size / (chip.link if near else chip.network)
    return {"compute": step.flops / chip.flops, "memory": step.traffic / chip.bandwidth, "links": seconds}
