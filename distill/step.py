"""The train step: weighted losses, gradient accumulation, and an optimizer update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pydantic import Field, model_validator

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.config import Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import compiling
from antgmm_jax.pure import Params
from distill import align
from distill.align import Part
from distill.answers import model_answer_sums
from distill.chunked import ANSWER_TERMS, at_positions
from distill.losses import LossConfig
from distill.optimizer import Optimizer, OptimizerConfig
from distill.schema import settings
from distill.state import State, shard_state
from distill.teacher import NO_TEACHER, Teacher, collected, model_inputs, to_dtype
from distill.trainable import combine, trainable

Batch = Mapping[str, Any]  # NumPy or JAX arrays
Gates = Mapping[str, Any]
Metrics = dict[str, Array]


@settings
class StepConfig(OptimizerConfig):
    """Settings of the train step: optimizer, batch size, dtype and rematerialisation.

    Attributes:
        batch_size: samples per optimizer step; with packing, rows.
        accumulate: number of micro-batches per step; it must divide `batch_size`. Steps are those of the whole batch;
            Taylor scores are means over micro-batches.
        dtype: dtype of computation; trained parameters, moments, norms and losses stay float32. "bfloat16" is for
            accelerators: a CPU is not faster with it.
        remat: what the student's layers store for the backward pass: "none" recomputes nothing, "dots" stores matrix
            products, "attention" the layers' inputs and what a flash kernel reads in the backward pass, "full"
            only the inputs (least memory).
    """

    batch_size: Annotated[int, Field(ge=1, le=1 << 20)]
    accumulate: Annotated[int, Field(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"

    @model_validator(mode="after")
    def _whole_pieces(self) -> "StepConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        return self

    def pieces(self, batches: int) -> dict[str, int]:
        """Splits batches of `batch_size` rows into micro-batches.

        Args:
            batches: number of batches.

        Returns:
            `batch_size` and `batches` of the micro-batches.
        """
        return {"batch_size": self.batch_size // self.accumulate, "batches": batches * self.accumulate}


@dataclass(frozen=True)
class Step:
    """A jitted train step: (state, batch, gates, teacher_params) -> (state, metrics). The state is donated.

    The learning rate is an argument of the program, so that one compiled program serves all schedules.

    Attributes:
        program: the jitted function, with the rate as last argument.
        schedule: jitted function step -> rate.
    """

    program: Any
    schedule: Callable[[Array], Array]

    def __call__(self, state: State, batch: Batch, gates: Gates, teacher_params: Params) -> tuple[State, Metrics]:
        """Takes one step.

        Args:
            state: parameters, moments and step; donated.
            batch: batch on the devices.
            gates: gates of the student; {} for all open.
            teacher_params: `Teacher.params`.

        Returns:
            The new state, and float32 scalars by name.
        """
        return self.program(state, batch, gates, teacher_params, self.schedule(state.step))


def jitted(step: Callable[..., tuple[State, Metrics]], optimizer: Optimizer) -> Step:
    """Creates a `Step` from a function that takes the learning rate as argument.

    Args:
        step: (state, batch, gates, teacher_params, rate) -> (state, metrics); the state is donated.
        optimizer: optimizer with the schedule of the rate.

    Returns:
        The step.
    """
    return Step(jax.jit(step, donate_argnums=0, compiler_options=compiling.options()), jax.jit(optimizer.schedule))


def make_loss(
    functional: Any,
    config: LossConfig,
    *,
    teacher: Teacher = NO_TEACHER,
    parts: tuple[Part, ...] = (),
    chunk: int = 512,
    dtype: DTypeLike = jnp.float32,
) -> Callable[..., tuple[Float[Array, ""], Metrics]]:
    """Returns the weighted loss of a batch as a pure, differentiable function.

    Args:
        functional: `Functional` of the student.
        config: weights and settings of the terms.
        teacher: source of the targets.
        parts: state comparisons (`align.parts`) for the hidden, vision and bridge terms.
        chunk: maximum number of answer tokens per device with logits in memory.
        dtype: dtype of computation; parameters are cast to it, losses are float32.

    Returns:
        loss(params, gates, batch, teacher_params, totals=None) -> (float32 scalar, {term: float32 mean}). A mean is a
        sum over the tokens of `batch`, divided by their number; for a term that compares the states of several towers,
        it is the mean over towers of these means. If `batch` is a micro-batch, `totals` is the result of `token_counts`
        for the whole batch: the sum is divided by these numbers, so that the losses of all micro-batches add up to the
        loss of the whole batch.

    Raises:
        AntgmmError: a term needs targets that neither the teacher nor `parts` provides.
    """
    chosen = align.selected(config, parts)
    states = tuple(dict.fromkeys(part.states for part in chosen))
    needs_final = any(term in ANSWER_TERMS for term in config.terms())
    targets_of = teacher.select((("final",) if config.reads_logits else ()) + states)
    collect = (("final",) if needs_final else ()) + states

    def loss(params: Params, gates: Gates, batch: Batch, teacher_params: Params, totals: Any = None):
        batch = jax.tree.map(jnp.asarray, dict(batch))  # of NumPy arrays where it is not traced
        tokens, part_tokens = token_counts(batch, chosen) if totals is None else totals
        master, params = params, to_dtype(params, dtype)
        targets = targets_of(teacher_params, batch)
        out = collected(functional.apply(params, model_inputs(batch), gates, collect=collect), collect)
        terms: Metrics = {}
        if needs_final:
            final = at_positions(out["final"], batch["positions"])
            sums = model_answer_sums(
                config,
                functional,
                teacher,
                (master, teacher_params, gates),
                final,
                batch,
                targets,
                chunk=chunk,
                dtype=dtype,
            )
            terms |= {name: value / tokens for name, value in sums.items()}
        for term in dict.fromkeys(part.term for part in chosen):
            mine = [(part, count) for part, count in zip(chosen, part_tokens, strict=True) if part.term == term]
            values = [
                align.state_sum(part, out[part.states], targets[part.states], batch, gates) / count
                for part, count in mine
            ]
            terms[term] = sum(values[1:], values[0]) / len(values)
        return jnp.sum(jnp.stack([getattr(config, name) * terms[name] for name in config.terms()])), terms

    return loss


def token_counts(batch: Batch, chosen: tuple[Part, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Numbers to divide by: answer tokens of a batch, and tokens of each comparison of `chosen`; at least 1 each."""
    answers = jnp.sum((batch["targets"] != IGNORE).astype(jnp.float32))
    return jnp.maximum(answers, 1.0), align.counts(batch, chosen)


def make_step(
    functional: Any,
    optimizer: Optimizer,
    config: LossConfig,
    *,
    teacher: Teacher = NO_TEACHER,
    parts: tuple[Part, ...] = (),
    micro_batches: int = 1,
    chunk: int = 512,
    dtype: DTypeLike = jnp.float32,
) -> Step:
    """Creates the train step; it is compiled once per batch shape.

    Gates are an argument, so changing them does not recompile; they get no gradient. On a mesh, the state keeps its
    sharding.

    Args:
        functional: `Functional` of the student.
        optimizer: from `make_optimizer`.
        config: weights and settings of the loss terms.
        teacher: source of the targets; its `params` are the last argument of the step.
        parts: state comparisons (`align.parts`) for the hidden, vision and bridge terms.
        micro_batches: number of micro-batches; gradients are summed in float32 and all tokens have equal weight, so the
            result is that of the whole batch.
        chunk: maximum number of answer tokens per device with logits in memory.
        dtype: dtype of computation; the parameters in the state keep theirs.

    Returns:
        The step. Metrics are float32 scalars: `loss`, the mean of every term, `grad_norm` (before clipping),
        `learning_rate` and `tokens`.

    Raises:
        AntgmmError: a term needs targets that neither the teacher nor `parts` provides.
    """
    chosen = align.selected(config, parts)
    loss = make_loss(functional, config, teacher=teacher, parts=parts, chunk=chunk, dtype=dtype)

    def step(state: State, batch: Batch, gates: Gates, teacher_params: Params, rate: Array) -> tuple[State, Metrics]:
        totals = token_counts(batch, chosen)
        trained = trainable(state.params, optimizer.frozen)

        def objective(trained: Params, piece: Batch):
            return loss(combine(trained, state.params), gates, piece, teacher_params, totals)

        (value, terms), grads = _accumulated(objective, trained, batch, micro_batches, config.terms())
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, trained)
        moved = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trained, updates)
        metrics = {"loss": value, **terms, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        metrics["tokens"] = jnp.sum((batch["targets"] != IGNORE).astype(jnp.float32))
        after = State(combine(moved, state.params), opt_state, state.step + 1)
        return shard_state(after, functional.axes, optimizer), metrics

    return jitted(step, optimizer)


def _accumulated(
    objective: Callable, trained: Params, batch: Batch, pieces: int, terms: tuple[str, ...]
) -> tuple[tuple[Array, Metrics], Params]:
    """Value and gradient of the objective, summed over micro-batches."""
    differentiated = jax.value_and_grad(objective, has_aux=True)
    if pieces < 1:
        raise AntgmmError(f"micro_batches = {pieces}: it must be at least 1")
    if pieces == 1:
        return differentiated(trained, batch)
    size = batch["targets"].shape[0]
    if size % pieces:
        raise AntgmmError(f"a batch of {size} does not split into {pieces} micro-batches: choose a divisor")

    # Micro-batch i has the rows i, i + pieces, ..., so that each device of a batch-sharded mesh keeps its own rows.
    def split(x: Array) -> Array:
        return x.reshape((size // pieces, pieces, *x.shape[1:])).swapaxes(0, 1)

    def body(total: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiated(trained, piece)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, dict.fromkeys(terms, zero)), jax.tree.map(jnp.zeros_like, trained)
    return jax.lax.scan(body, start, jax.tree.map(split, dict(batch)))[0]
