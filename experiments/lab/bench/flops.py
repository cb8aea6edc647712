"""FLOPs of a train step, counted twice: what the mathematics needs, and what the program that was traced computes."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

import pruning
from antgmm_jax.config import LMMConfig


def step_flops(student: LMMConfig, teacher: LMMConfig, batch: Mapping[str, np.ndarray], *, online: bool = False) -> int:
    """FLOPs that a distillation step needs on a batch whose answer positions are all valid; none is counted twice.

    Args:
        student: the model that is trained: a forward pass three times, for outputs and gradients of inputs and weights.
        teacher: its head runs once, and where it is online so does all before that.
        batch: from `random_batch`.
        online: whether the teacher runs inside the step.

    Returns:
        FLOPs of matrix products.
    """
    head = _head_flops(teacher, batch)
    return 3 * scoring_flops(student, batch) + (scoring_flops(teacher, batch) if online else head)


def scoring_flops(config: LMMConfig, batch: Mapping[str, np.ndarray]) -> int:
    """FLOPs of a teacher-forced forward pass with logits at the answer positions only.

    Args:
        config: the model.
        batch: from `random_batch`.

    Returns:
        FLOPs of matrix products.
    """
    rows, answer = batch["targets"].shape
    forward = pruning.forward_flops(config, rows, batch["input_ids"].shape[1], answer)
    return sum(forward.values()) - forward["tokens"] + _head_flops(config, batch)


def _head_flops(config: LMMConfig, batch: Mapping[str, np.ndarray]) -> int:
    return 2 * batch["targets"].size * config.language.decoder.embed * config.language.vocab


def traced_flops(program: Any, *, loops_once: bool = False) -> int:
    """FLOPs of the matrix products of a traced program, what is computed again in its backward pass included.

    What no result depends on is left out, as the compiler leaves it out. A kernel that is no matrix product to JAX
    (cuDNN's attention) is not seen.

    Args:
        program: `jax.stages.Traced.jaxpr`.
        loops_once: count the body of a loop once, as XLA's own cost analysis does.

    Returns:
        FLOPs.

    Raises:
        ValueError: a convolution, or a loop of unknown length around a product: neither can be counted.
    """
    live, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _counted(live, loops_once)


def _counted(jaxpr: Any, loops_once: bool) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            raise ValueError("a convolution's FLOPs are not counted")
        else:
            inner = [_counted(part, loops_once) for part in _parts(equation)]
            # Of branches one is taken.
            found = max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
            if found and equation.primitive.name == "while" and not loops_once:
                raise ValueError("a loop whose length is not known has no count")
            turns = equation.params["length"] if equation.primitive.name == "scan" and not loops_once else 1
            total += turns * found
    return total


def _parts(equation: Any) -> Iterator[Any]:
    """The programs inside an equation; a function's own derivative rule is not traced yet and not among them."""
    for leaf in jax.tree.leaves([*equation.params.values()], is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(leaf, "eqns"):
            yield leaf
