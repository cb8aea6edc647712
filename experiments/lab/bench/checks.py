"""Correctness checks of a device, which must pass before it is benchmarked."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import forced_logits, generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import save_hf
from antgmm_jax.pure import Params, functional
from distill import LossConfig, make_loss
from distill.chunked import at_positions
from distill.teacher import to_dtype
from experiments.lab.bench.batches import device_arrays
from experiments.run.export.export_gate import split, torch_logits, torch_model
from experiments.run.rows.random_batches import teacher_forced

FLOAT32 = 1e-4
BFLOAT16 = 0.1
"""Allowed difference of logits relative to their largest magnitude. bfloat16 has eight significant bits and rounds the
residual stream after each of up to 300 sublayers; a wrong mask or cast causes a relative difference of about 1."""
GRADIENT = 0.3
"""Allowed difference of a parameter's gradient in bfloat16, relative to its norm."""


class Check(NamedTuple):
    """A comparison of logits or gradients.

    Attributes:
        name: name of the check.
        against: the reference.
        error: largest difference, relative to the largest magnitude; of gradients, relative to their norm.
        allowed: largest error that passes.
    """

    name: str
    against: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is small enough; NaN is not."""
        return self.error <= self.allowed


def correctness(config: LMMConfig, params: Params, batch: Mapping[str, np.ndarray]) -> list[Check]:
    """Compares logits and gradients of the device with references.

    Args:
        config: model config.
        params: float32 parameters on the device.
        batch: from `random_batch`.

    Returns:
        Checks of float32 against the CPU (on a CPU, against PyTorch), of bfloat16 against float32, of cached decoding
        against a forward pass over the same tokens, of the chosen tokens against the largest logits of that pass, and
        of the gradients of rows with padding in bfloat16 against float32.
    """
    arrays = device_arrays(batch)
    # By default, JAX multiplies float32 matrices at lower precision on GPUs and TPUs.
    with jax.default_matmul_precision("highest"):
        in_float32 = np.asarray(_answer_logits(config)(params, arrays))
        against, reference = _reference(config, params, batch)
        tokens, stepped, whole = _decoded(config, params, batch)
        gradients = _gradients(config, params, batch, "float32")
    in_bfloat16 = _answer_logits(config)(to_dtype(params, jnp.bfloat16), arrays)
    chosen, largest = np.take_along_axis(whole, tokens[:, :, None], axis=2), whole.max(axis=2, keepdims=True)
    return [
        Check("float32 forward", against, _error(in_float32, reference), FLOAT32),
        Check(
            "bfloat16 forward",
            "float32 on the same device",
            _error(np.asarray(in_bfloat16, np.float32), in_float32),
            BFLOAT16,
        ),
        Check("cached decode", "a forward pass without cache", _error(stepped, whole), FLOAT32),
        Check("greedy answers", "the largest logits of that pass", _error(chosen, largest), FLOAT32),
        Check(
            "bfloat16 gradients",
            "float32 on the same device",
            _furthest(_gradients(config, params, batch, "bfloat16"), gradients),
            GRADIENT,
        ),
    ]


def refuse(checks: Mapping[str, Sequence[Check]]) -> None:
    """Raises an error if a check has failed.

    Args:
        checks: model -> checks.

    Raises:
        AntgmmError: names the first failed check and its error.
    """
    for model, checks_of_model in checks.items():
        for check in checks_of_model:
            if not check.passed:
                raise AntgmmError(
                    f"{model}, {check.name}: a relative difference of {check.error:.2g} from {check.against},"
                    f" {check.allowed:g} is allowed: the device computes wrong results;"
                    " try another jaxlib or driver, or unset XLA_FLAGS"
                )


def _answer_logits(config: LMMConfig) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
    """Logits [B, A, V] at the answer positions, teacher forced."""
    pure = functional(config)

    @jax.jit
    def logits(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        final = pure.apply(params, batch, collect=("final",))["final"]
        return pure.head(params, at_positions(final, batch["positions"]))

    return logits


def _reference(config: LMMConfig, params: Params, batch: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """Name of the reference, and its logits."""
    if jax.devices()[0].platform != "cpu":
        try:
            host = jax.devices("cpu")[0]
        except RuntimeError as error:
            raise AntgmmError("JAX has no CPU device to compare with: unset JAX_PLATFORMS, or add cpu to it") from error
        placed = jax.device_put((params, device_arrays(batch)), host)
        return "the host's CPU", np.asarray(_answer_logits(config)(*placed))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_hf(config, jax.tree.map(np.asarray, params), directory)
        return "PyTorch", torch_logits(torch_model(directory), split(batch)[0], batch)


def _decoded(
    config: LMMConfig, params: Params, batch: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy answers [B, T]; the logits [B, T, V] before each token, with a cache and without."""
    length = batch["targets"].shape[1]
    prompt = jax.tree.map(jnp.asarray, split(batch)[1])
    tokens = generate(config, params, prompt, max_new_tokens=length, eos=(), pad=0)

    forced = {"images": batch["images"], **teacher_forced(config, split(batch)[1], np.asarray(tokens))}
    whole = _answer_logits(config)(params, device_arrays(forced))
    return np.asarray(tokens), np.asarray(forced_logits(config, params, prompt, tokens)), np.asarray(whole)


def _gradients(config: LMMConfig, params: Params, batch: Mapping[str, np.ndarray], dtype: str) -> list[np.ndarray]:
    """Gradients of the loss of right answers, with half of the last row's answer as padding."""
    arrays = {name: value for name, value in batch.items() if not name.startswith("prompt/")}
    mask, targets = np.array(batch["attention_mask"]), np.array(batch["targets"])
    rest = mask.shape[1] - targets.shape[1] // 2
    mask[-1, rest:] = 0
    if not config.encoder_decoder:  # else an encoder reads the mask, that of the prompt
        targets[-1] = np.where(batch["positions"][-1] < rest - 1, targets[-1], IGNORE)
    arrays = device_arrays({**arrays, "attention_mask": mask, "targets": targets})
    loss = make_loss(functional(config), LossConfig(hard=1.0), dtype=dtype)
    gradients = jax.jit(jax.grad(lambda params, batch: loss(params, {}, batch, {})[0]))(params, arrays)
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(gradients)]


def _furthest(gradients: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Largest relative difference of a gradient; that of one nearly zero is relative to a hundredth of the whole."""
    least = 0.01 * np.sqrt(sum(np.square(leaf).sum() for leaf in reference))
    pairs = zip(gradients, reference, strict=True)
    # NumPy's maximum, of which NaN is one.
    return float(np.max([np.linalg.norm(one - other) / max(np.linalg.norm(other), least) for one, other in pairs]))


def _error(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(logits - reference).max() / np.abs(reference).max())
