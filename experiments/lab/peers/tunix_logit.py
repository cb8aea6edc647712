"""google-tunix as a contender: its distillation trainer with the logit strategy, in the peers' environment."""
# pyright: reportMissingImports=false

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput
from tunix.distillation.strategies import LogitStrategy
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.hooks import TrainingHooks
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from experiments.lab.peers.record import SIDE, Recorder
from experiments.lab.peers.task import BUCKETED, IGNORE, Task, Text, in_order, planned, read

PROMPT, ANSWER = 1, 2  # in the mask of the trainer's input, 0 for padding


class AnswerStrategy(LogitStrategy):
    """Forward KL as a mean over answer tokens; tunix's own strategy has no mask and adds a task loss.

    It computes less than its parent: no cross-entropy with one-hot labels.
    """

    def compute_loss(self, student_output: jax.Array, teacher_output: jax.Array, labels: jax.Array):
        """Returns the mean KL(teacher || student) over the tokens marked by `labels`, and no metrics."""
        student = jax.nn.log_softmax(student_output / self.temperature)
        teacher = jax.nn.softmax(teacher_output / self.temperature)
        kl = optax.kl_divergence(student, teacher) * self.temperature**2
        return jnp.sum(kl * labels) / jnp.sum(labels), {}


class _StepHooks(TrainingHooks):
    """Records the loss of every step after the warm-up."""

    def __init__(self, record: Recorder, warm: int):
        self._record, self._warm = record, warm

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        if train_step > self._warm:
            self._record.step(train_loss)

    def on_train_start(self, train_ctx): ...

    def on_train_end(self, train_ctx): ...

    def on_train_step_start(self, train_ctx): ...

    def on_eval_step_start(self, train_ctx): ...

    def on_eval_step_end(self, train_ctx, eval_loss): ...


def main(work: Path, out: Path, mode: str) -> None:
    """Runs the contender.

    Args:
        work: folder of the task.
        out: JSON file to write.
        mode: "padded" for rows in file order, with batches padded to a multiple of 32, like a user would do;
            "bucketed" for this toolkit's batches of rows of similar length.
    """
    record = Recorder("google-tunix", "jax", "flax")
    task, text = read(work)
    plan = np.load(work / BUCKETED) if mode == "bucketed" else in_order(task)
    student, teacher = (_model(work / "text" / name) for name in ("student", "teacher"))
    trainer = _trainer(task, student, teacher)
    start = jax.tree.map(jnp.copy, nnx.state((trainer.model, trainer.optimizer)))
    by_width = {batch.input_tokens.shape[1]: batch for batch in _inputs(task, text, plan)}
    # A program is compiled for each width, and again for states that are outputs of a step: warm up both.
    warm = [*by_width.values()] * 2
    # Managed externally, the trainer can be called twice: for the warm-up and for the epoch.
    trainer.is_managed_externally = True
    trainer.with_training_hooks(_StepHooks(record, len(warm)))
    nnx.update((trainer.model, trainer.optimizer), jax.tree.map(jnp.copy, start))
    trainer.train(warm)
    nnx.update((trainer.model, trainer.optimizer), start)
    record.ready()
    trainer.train(_inputs(task, text, plan))
    trainer.close()  # reports the last loss
    matrix, product = jnp.ones((SIDE, SIDE), jnp.float32), jax.jit(jnp.dot)
    record.write(out, lambda: product(matrix, matrix).block_until_ready(), task.batch)


def _model(folder: Path) -> Llama3:
    hf = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)


def _trainer(task: Task, student: Llama3, teacher: Llama3) -> DistillationTrainer:
    answers = task.answer[1]

    def at_answers(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions of the logits that predict answer tokens, and which of them are valid, both [B, A]."""
        count = jnp.sum(mask == ANSWER, axis=1, keepdims=True)
        places = jnp.sum(mask > 0, axis=1, keepdims=True) - count - 1 + jnp.arange(answers)
        return jnp.minimum(places, mask.shape[1] - 1), jnp.arange(answers) < count

    def forward(model: Llama3, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        valid = mask > 0
        logits, _ = model(tokens, build_positions_from_mask(valid), None, make_causal_attn_mask(valid))
        return jnp.take_along_axis(logits, at_answers(mask)[0][..., None], axis=1)

    def labels(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return at_answers(mask)[1].astype(jnp.float32)

    optimizer = optax.adamw(
        task.learning_rate,
        weight_decay=task.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    strategy = AnswerStrategy(forward, forward, labels, temperature=1.0, alpha=1.0)
    trainer = DistillationTrainer(student, teacher, strategy, optimizer, TrainingConfig(eval_every_n_steps=1 << 30))
    return trainer.with_gen_model_input_fn(lambda x: {"tokens": x.input_tokens, "mask": x.input_mask})


def _inputs(task: Task, text: Text, plan: np.ndarray) -> Iterator[TrainingInput]:
    for rows, batch in zip(plan, planned(task, text, plan), strict=True):
        answers = (batch["targets"] != IGNORE).sum(axis=1)
        mask = batch["attention_mask"] * PROMPT
        for place, row in enumerate(rows):
            end = len(text.ids[row])
            mask[place, end - answers[place] : end] = ANSWER
        yield TrainingInput(input_tokens=batch["input_ids"], input_mask=mask)
