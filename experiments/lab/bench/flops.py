"""FLOPs of a train step: the necessary ones from the config, and those of the traced program."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

import pruning
from antgmm_jax.config import LMMConfig


def step_flops(student: LMMConfig, teacher: LMMConfig, batch: Mapping[str, np.ndarray], *, online: bool = False) -> int:
    """Returns the necessary FLOPs of a distillation step, without recomputation, if all answer positions are valid.

    Args:
        student: config of the student; it counts three times a forward pass (outputs, gradients of inputs and weights).
        teacher: config of the teacher; its head counts once, and if `online` its whole forward pass.
        batch: from `random_batch`.
        online: whether the teacher runs inside the step.

    Returns:
        FLOPs of matrix products.
    """
    head = _head_flops(teacher, batch)
    return 3 * scoring_flops(student, batch) + (scoring_flops(teacher, batch) if online else head)


def scoring_flops(config: LMMConfig, batch: Mapping[str, np.ndarray]) -> int:
    """Returns the FLOPs of a forward pass with teacher forcing and logits at the answer positions only.

    Args:
        config: model config.
        batch: from `random_batch`.

    Returns:
        FLOPs of matrix products.
    """
    rows, answer = batch["targets"].shape
    return sum(pruning.forward_flops(config, rows, batch["input_ids"].shape[1], answer, logits=answer).values())


def _head_flops(config: LMMConfig, batch: Mapping[str, np.ndarray]) -> int:
    return 2 * batch["targets"].size * config.language.decoder.embed * config.language.vocab


def traced_flops(program: Any, *, loops_once: bool = False) -> int:
    """Returns the FLOPs of the matrix products of a traced program, including recomputation in the backward pass.

    Dead code does not count. Custom kernels such as cuDNN's attention are not visible.

    Args:
        program: `jax.stages.Traced.jaxpr`.
        loops_once: whether to count the body of a loop once, like XLA's cost analysis.

    Returns:
        FLOPs.

    Raises:
        ValueError: the program contains a convolution, or a matrix product in a loop of unknown length.
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
            # Only one branch of a condition runs.
            flops = max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
            if flops and equation.primitive.name == "while" and not loops_once:
                raise ValueError("cannot count FLOPs in a loop of unknown length")
            trips = equation.params["length"] if equation.primitive.name == "scan" and not loops_once else 1
            total += trips * flops
    return total


def _parts(equation: Any) -> Iterator[Any]:
    """Programs inside an equation, except custom derivative rules, which are not traced yet."""
    for leaf in jax.tree.leaves([*equation.params.values()], is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(leaf, "eqns"):
            yield leaf
