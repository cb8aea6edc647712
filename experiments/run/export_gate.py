"""The export gate: checks that exported files in stock `transformers` give the same results as the JAX student."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.families import torch_images
from antgmm_jax.io.hub import local
from antgmm_jax.pure import Params, functional

TOLERANCE = 1e-5
"""Allowed difference of logits relative to their largest magnitude (at least 1)."""

ROUNDING = 5.0
"""Larger differences pass up to this factor times PyTorch's own rounding error (float32 against float64), over all
prompts: attention logits of several hundreds (T5 does not scale them) amplify rounding. The amplification varies
randomly between prompts (in the demo, the worst is 48 times the median), so a single prompt's error is not a bound.
Parameters that are wrong by 0.01 % exceed the bound by a factor of twenty.
"""


class GateResult(NamedTuple):
    """Result of the comparison.

    Attributes:
        max_abs_logit_diff: largest difference of float32 logits at answer positions.
        max_abs_logit: largest magnitude of these logits.
        torch_rounding: largest difference between PyTorch's float32 and float64 logits; 0 if it was not needed.
        answers_equal: fraction of prompts with equal greedy answers, token by token.
        prompts: number of prompts.
        passed: whether logits are within TOLERANCE or rounding, and all answers are equal.
        where: description of the first difference; "" if there is none.
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    torch_rounding: float
    answers_equal: float
    prompts: int
    passed: bool
    where: str


def torch_model(directory: str | os.PathLike):
    """Loads a checkpoint with stock `transformers`, in float32 and evaluation mode, for greedy decoding.

    Only the special tokens of its generation_config.json are used, because JAX decodes without beams, penalties and
    minimum lengths.

    Raises:
        AntgmmError: PyTorch is not installed, or a tensor is missing, unexpected or has the wrong shape.
    """
    require("torch")
    import torch
    import transformers

    directory = local(directory)
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        raise AntgmmError(f"{directory}: config.json has no architecture of transformers: export again")
    model, info = architecture.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise AntgmmError(f"{directory}: transformers reports {problem} {sorted(info[problem])[:5]}: export again")
    for part in _generating(model):
        generation = part.generation_config
        tokens = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        part.generation_config = transformers.GenerationConfig(**{name: getattr(generation, name) for name in tokens})
    return model.eval()


def stop_at(model, *, eos: int, pad: int) -> None:
    """Sets the end and padding tokens of a model's answers.

    Args:
        model: from `torch_model`, changed in place.
        eos: token that ends an answer.
        pad: token after the end of an answer.
    """
    for part in _generating(model):
        part.generation_config.pad_token_id, part.generation_config.eos_token_id = pad, eos


def _generating(model) -> list[Any]:
    """The model, and its language model if that has a generation config of its own."""
    inner = getattr(model, "language_model", None)
    return [part for part in (model, inner) if getattr(part, "generation_config", None) is not None]


def check(
    directory: str | os.PathLike,
    config: LMMConfig,
    params: Params,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    max_new_tokens: int,
    eos: int,
    pad: int,
) -> GateResult:
    """Compares exported files in PyTorch with the student in JAX.

    Args:
        directory: exported checkpoint.
        config: config of the student.
        params: parameters of the student.
        batches: training batches (prompts with answers) for logits, which also contain the prompts alone with the
            prefix `prompt/`.
        max_new_tokens: length of the greedy answers.
        eos: token that ends an answer.
        pad: token after the end of an answer.

    Returns:
        Result of the comparison.
    """
    model = torch_model(directory)
    stop_at(model, eos=eos, pad=pad)
    apply = jax.jit(functional(config).apply)
    # Exact: `params` are already rounded to the dtype of the files.
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    worst, ids, equal, sample_numbers, scale, where = [], [], [], [], 0.0, ""
    for batch in batches:
        inputs, prompt = split(batch)
        # By default, accelerators multiply float32 at lower precision, which exceeds the tolerance.
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(apply(params, inputs)["logits"])
            jax_answers = np.asarray(generate(config, params, prompt, max_new_tokens=max_new_tokens, eos=eos, pad=pad))
        jax_logits = _answer_logits(logits, batch)
        reference = torch_logits(model, inputs, batch)
        worst += [*np.abs(jax_logits - reference).max(axis=(1, 2))]
        scale = max(scale, float(np.abs(reference).max()))
        torch_ids = torch_answers(model, prompt, max_new_tokens, pad)
        ids += [*batch.get("id", np.arange(len(equal), len(equal) + len(jax_answers)))]
        equal += [*(jax_answers == torch_ids).all(axis=1)]
        sample_numbers += [*batch.get("index", np.arange(len(sample_numbers), len(sample_numbers) + len(jax_answers)))]
        if not where and not all(equal):
            row = int((jax_answers != torch_ids).any(axis=1).argmax())
            answers = f"JAX {jax_answers[row].tolist()}, PyTorch {torch_ids[row].tolist()}"
            where = f"the answer to sample {ids[len(ids) - len(jax_answers) + row]} differs: {answers}"
    diff, bound, rounding = float(np.max(worst)), TOLERANCE * max(1.0, scale), 0.0
    if not diff <= bound:  # also for NaN
        # Compute logits again, as those of all prompts may not fit into memory.
        exact = torch_model(directory).double()
        for batch in batches:
            inputs, _ = split(batch)
            off = torch_logits(exact, inputs, batch) - torch_logits(model, inputs, batch)
            rounding = max(rounding, float(np.abs(off).max()))
        bound = max(bound, ROUNDING * rounding)
    if not diff <= bound:
        where = f"logits of sample {ids[int(np.argmax(worst))]} differ by {diff:.3g}, more than {bound:.3g}"
    # The last row may be repeated to fill a batch.
    once = np.unique(sample_numbers, return_index=True)[1]
    return GateResult(diff, scale, rounding, float(np.mean(np.array(equal)[once])), len(once), not where, where)


def torch_logits(model, inputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Computes PyTorch's logits at the answer positions, in the dtype of the model.

    Args:
        model: from `torch_model`.
        inputs: model inputs, from `split`.
        batch: the batch, with `positions` and `targets`.

    Returns:
        [B, A, V], zero without a target.
    """
    import torch

    tensors = {
        name: x.to(model.dtype) if x.is_floating_point() else x for name, x in torch_tensors(model, inputs).items()
    }
    with torch.no_grad():
        return _answer_logits(model(**tensors).logits.numpy(), batch)


def split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a training batch into model inputs with answers, and prompts alone."""
    inputs = {
        name: batch[name] for name in ("images", "input_ids", "attention_mask", "decoder_input_ids") if name in batch
    }
    prompt = {"images": batch["images"]}
    prompt |= {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
    return inputs, prompt


def _answer_logits(logits: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits at the answer positions, zero without a target."""
    at = np.take_along_axis(logits, batch["positions"][:, :, None], axis=1)
    return np.where(batch["targets"][:, :, None] == -100, 0.0, at)


def torch_tensors(model, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a batch to PyTorch tensors: images in the family's format, ids and masks as int64."""
    import torch

    has_images = "images" in arrays and np.any(arrays["images"]["valid"])
    pixels = torch_images(arrays, model.config) if has_images else {}
    rest = {name: array for name, array in arrays.items() if name != "images"}
    # Copies, because PyTorch warns about read-only arrays such as JAX's.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in {**pixels, **rest}.items()}
    return {name: t.long() if name.endswith(("ids", "mask")) else t for name, t in tensors.items()}


def torch_answers(model, prompt: Mapping[str, np.ndarray], max_new_tokens: int, pad: int, **options) -> np.ndarray:
    """Generates greedy answers with PyTorch.

    Args:
        model: from `torch_model`.
        prompt: `images`, `input_ids`, `attention_mask`.
        max_new_tokens: length of the answers.
        pad: token after the end of an answer.
        options: further options of `generate`.

    Returns:
        Token ids of the answers, [B, max_new_tokens], padded.
    """
    import torch

    with torch.no_grad():
        ids = model.generate(
            **torch_tensors(model, prompt), max_new_tokens=max_new_tokens, do_sample=False, **options
        ).numpy()
    start = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    ids = ids[:, start:]
    return np.pad(ids, ((0, 0), (0, max_new_tokens - ids.shape[1])), constant_values=pad)
