"""The gate that no run skips: the exported files, read back by plain `transformers`, answer as the JAX student does."""

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
from antgmm_jax.pure import Params, functional

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of their largest magnitude; also the floor."""

ROUNDING = 5.0
"""Larger differences pass up to this many times what PyTorch's own float32 logits are from its float64 ones, over all
prompts: attention logits of several hundreds (T5 does not scale them) amplify what both round. By how much is chance
and differs between prompts (the demo's worst by 48 times the median), so that one prompt's own rounding settles
nothing; parameters that are 0.01 % off differ by twenty times the bound.
"""


class GateResult(NamedTuple):
    """What the comparison found.

    Attributes:
        max_abs_logit_diff: largest difference of float32 logits at answer positions.
        max_abs_logit: their largest magnitude.
        torch_rounding: how far PyTorch's float32 logits are from its float64 ones at most, where that had to decide;
            else 0.
        answers_equal: share of prompts with the same greedy answer, token for token.
        prompts: number of prompts.
        passed: whether logits are within TOLERANCE or rounding, and every answer is equal.
        where: what differs first; "" where nothing does.
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    torch_rounding: float
    answers_equal: float
    prompts: int
    passed: bool
    where: str


def torch_model(directory: str | os.PathLike):
    """A checkpoint directory as plain `transformers` reads it, float32, in evaluation mode, to answer greedily.

    Of what its generation_config.json says only the special tokens are taken: beams, penalties and least lengths are
    for whoever serves it, and would not be what JAX is compared with.

    Raises:
        AntgmmError: PyTorch is not installed, or a tensor is missing, left over or misshapen.
    """
    require("torch")
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        raise AntgmmError(f"{directory}: config.json names no architecture of transformers: export again")
    model, info = architecture.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise AntgmmError(f"{directory}: transformers reports {fault} {sorted(info[fault])[:5]}: export again")
    for part in _generating(model):
        found = part.generation_config
        tokens = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        part.generation_config = transformers.GenerationConfig(**{name: getattr(found, name) for name in tokens})
    return model.eval()


def _generating(model) -> list[Any]:
    """The model, and its language model where it calls the `generate` of that."""
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
    """Compares exported files, read by PyTorch, with the student in JAX.

    Args:
        directory: the exported checkpoint.
        config: the student.
        params: its parameters.
        batches: full training batches (prompts with their answers) for logits; prompts for answers under the same
            names prefixed `prompt/`.
        max_new_tokens: length of the greedy answers.
        eos: token that ends an answer.
        pad: token after the end.

    Returns:
        The figures, and where the first difference is.
    """
    model = torch_model(directory)
    for part in _generating(model):
        part.generation_config.pad_token_id, part.generation_config.eos_token_id = pad, eos
    apply = jax.jit(functional(config).apply)
    # The files hold what was exported: in another dtype than float32 that is not `params` to the last bit.
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    worst, ids, equal, asked, scale, where = [], [], [], [], 0.0, ""
    for batch in batches:
        inputs, prompt = split(batch)
        # An accelerator's own float32 products keep a tenth of the bits: the tolerance does not forgive that.
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(apply(params, inputs)["logits"])
            mine = np.asarray(generate(config, params, prompt, max_new_tokens=max_new_tokens, eos=eos, pad=pad))
        ours = _answer_logits(logits, batch)
        reference = torch_logits(model, inputs, batch)
        worst += [*np.abs(ours - reference).max(axis=(1, 2))]
        scale = max(scale, float(np.abs(reference).max()))
        theirs = torch_answers(model, prompt, max_new_tokens, pad)
        ids += [*batch.get("id", np.arange(len(equal), len(equal) + len(mine)))]
        equal += [*(mine == theirs).all(axis=1)]
        asked += [*batch.get("index", np.arange(len(asked), len(asked) + len(mine)))]
        if not where and not all(equal):
            row = int((mine != theirs).any(axis=1).argmax())
            answers = f"JAX {mine[row].tolist()}, PyTorch {theirs[row].tolist()}"
            where = f"the answer to sample {ids[len(ids) - len(mine) + row]} differs: {answers}"
    diff, bound, rounding = float(np.max(worst)), TOLERANCE * max(1.0, scale), 0.0
    if not diff <= bound:  # nor is what is no number
        # Computed again, for the logits of all prompts need not fit into memory.
        exact = torch_model(directory).double()
        for batch in batches:
            inputs, _ = split(batch)
            off = torch_logits(exact, inputs, batch) - torch_logits(model, inputs, batch)
            rounding = max(rounding, float(np.abs(off).max()))
        bound = max(bound, ROUNDING * rounding)
    if not diff <= bound:
        where = f"logits of sample {ids[int(np.argmax(worst))]} differ by {diff:.3g}, more than {bound:.3g}"
    # The last row stands several times where it fills a batch.
    once = np.unique(asked, return_index=True)[1]
    return GateResult(diff, scale, rounding, float(np.mean(np.array(equal)[once])), len(once), not where, where)


def torch_logits(model, inputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """PyTorch's logits at the answer positions, in the model's own dtype.

    Args:
        model: from `torch_model`.
        inputs: what it reads, from `split`.
        batch: the whole batch, with `positions` and `targets`.

    Returns:
        [B, A, V], zero where there is no target.
    """
    import torch

    tensors = {
        name: x.to(model.dtype) if x.is_floating_point() else x for name, x in torch_tensors(model, inputs).items()
    }
    with torch.no_grad():
        return _answer_logits(model(**tensors).logits.numpy(), batch)


def split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model reads of a training batch: prompts with their answers, and prompts alone."""
    inputs = {
        name: batch[name] for name in ("images", "input_ids", "attention_mask", "decoder_input_ids") if name in batch
    }
    prompt = {"images": batch["images"]}
    prompt |= {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
    return inputs, prompt


def _answer_logits(logits: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits at the answer positions, zero where there is no target."""
    at = np.take_along_axis(logits, batch["positions"][:, :, None], axis=1)
    return np.where(batch["targets"][:, :, None] == -100, 0.0, at)


def torch_tensors(model, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a PyTorch model takes it: pictures as its family hands them in, ids and masks as int64."""
    import torch

    shown = "images" in arrays and np.any(arrays["images"]["valid"])
    pixels = torch_images(model.config.model_type, arrays["images"]) if shown else {}
    rest = {name: array for name, array in arrays.items() if name != "images"}
    # Copied, for JAX's arrays cannot be written to and PyTorch warns of such.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in {**pixels, **rest}.items()}
    return {name: t.long() if name.endswith(("ids", "mask")) else t for name, t in tensors.items()}


def torch_answers(model, prompt: Mapping[str, np.ndarray], max_new_tokens: int, pad: int, **options) -> np.ndarray:
    """PyTorch's greedy answers alone, [B, max_new_tokens], padded.

    Args:
        model: from `torch_model`.
        prompt: `images`, `input_ids`, `attention_mask`.
        max_new_tokens: length of the answers.
        pad: token after the end.
        options: further options of `generate`.

    Returns:
        int token ids.
    """
    import torch

    with torch.no_grad():
        ids = model.generate(
            **torch_tensors(model, prompt), max_new_tokens=max_new_tokens, do_sample=False, **options
        ).numpy()
    start = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    ids = ids[:, start:]
    return np.pad(ids, ((0, 0), (0, max_new_tokens - ids.shape[1])), constant_values=pad)
