"""Exported files in stock `transformers`: loading, logits and greedy answers."""

import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.families import torch_images
from antgmm_jax.io.files import one_line
from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import hf_config
from experiments.run.host.console import say

Result = TypeVar("Result")
ROOM, WORKSPACE = 2, 1 << 30
"""A GPU needs this many times the bytes of a model, and bytes for its libraries; else PyTorch runs on the CPU."""
CROWDED = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")
"""What CUDA's libraries say if they have no memory; PyTorch raises a RuntimeError then."""


def torch_device(nbytes: int) -> str:
    """Returns the device on which PyTorch has room for a model: "cuda" or "cpu".

    Args:
        nbytes: bytes of the model's parameters.
    """
    import torch

    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > _needed(nbytes) else "cpu"


def _needed(nbytes: int) -> int:
    return ROOM * nbytes + WORKSPACE


def without_gpu(model: Any) -> str:
    """Returns a line about a model that runs on the CPU although there is a GPU; "" for any other.

    Args:
        model: from `torch_model`.
    """
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        return ""
    needed, free = _needed(model.get_memory_footprint()), torch.cuda.mem_get_info()[0]
    return (
        f"warning: the model runs on the CPU: on the GPU, it is loaded with {needed / 1e9:.3g} GB free,"
        f" of which there are {free / 1e9:.3g}"
    )


def torch_model(directory: str | os.PathLike):
    """Loads a checkpoint with stock `transformers`, in float32 and evaluation mode, for greedy decoding.

    It runs on a GPU if there is one with enough free memory, without TensorFloat-32.

    Only the special tokens of its generation_config.json are used, because JAX decodes without beams, penalties and
    minimum lengths.

    Args:
        directory: Hugging Face directory, or a name of the Hub.

    Returns:
        The model.

    Raises:
        AntgmmError: as in `cpu_model`.
    """
    return placed(cpu_model(directory))


def placed(model):
    """Moves a model to a GPU if there is one with enough free memory.

    Args:
        model: from `cpu_model`.

    Returns:
        The model.
    """
    return model.to(torch_device(model.get_memory_footprint()))


def cpu_model(directory: str | os.PathLike):
    """Loads a checkpoint as `torch_model` does, on the CPU.

    Args:
        directory: Hugging Face directory, or a name of the Hub.

    Returns:
        The model.

    Raises:
        AntgmmError: PyTorch is not installed, or a tensor is missing, unexpected or has the wrong shape.
    """
    require("torch")
    import torch
    import transformers

    directory = local(directory)
    architecture = _architecture(directory, hf_config(directory))
    options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    with one_line(lambda: f"{directory} cannot be loaded by transformers", "export again"):
        loaded: Any = architecture.from_pretrained(directory, output_loading_info=True, **options)
        model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise AntgmmError(f"{directory}: transformers reports {problem} {sorted(info[problem])[:5]}: export again")
    for part in _generating(model):
        generation = part.generation_config
        tokens = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        part.generation_config = transformers.GenerationConfig(**{name: getattr(generation, name) for name in tokens})
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return model.eval()


def empty_model(directory: str | os.PathLike):
    """Returns the modules of a checkpoint in stock `transformers`, without its weights.

    Raises:
        AntgmmError: PyTorch is not installed, or transformers has no such architecture.
    """
    require("torch")
    import torch

    directory = local(directory)
    config = hf_config(directory)
    with torch.device("meta"):
        return _architecture(directory, config)(config)


def _architecture(directory: Path, config: Any) -> Any:
    """The class of transformers that config.json names."""
    import transformers

    architecture: Any = getattr(transformers, str((config.architectures or [""])[0]), None)
    if transformers.PreTrainedModel not in getattr(architecture, "__mro__", ()):
        raise AntgmmError(f"{directory}: config.json has no architecture of transformers: export again")
    return architecture


def stop_at(model, *, eos: int | list[int], pad: int) -> None:
    """Sets the end and padding tokens of a model's answers.

    Args:
        model: from `torch_model`, changed in place.
        eos: token or tokens that end an answer.
        pad: token after the end of an answer.
    """
    for part in _generating(model):
        part.generation_config.pad_token_id, part.generation_config.eos_token_id = pad, eos


def _generating(model) -> list[Any]:
    """The model, and its language model if that has a generation config of its own."""
    inner = getattr(model, "language_model", None)
    return [part for part in (model, inner) if getattr(part, "generation_config", None) is not None]


def on_cpu_if_crowded(call: Callable[..., Result]) -> Callable[..., Result]:
    """Repeats a call on the CPU, where the model then stays, if a GPU has no room for it beside what JAX holds.

    Args:
        call: function of a model and of other arguments.

    Returns:
        The same function.
    """

    @wraps(call)
    def run(model, *arguments, **options):
        import torch

        try:
            return call(model, *arguments, **options)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if model.device.type == "cpu" or not any(words in str(error) for words in CROWDED):
                raise
        say("PyTorch continues on the CPU: the GPU has no room for it beside JAX")
        model.to("cpu")
        torch.cuda.empty_cache()
        return call(model, *arguments, **options)

    return run


@on_cpu_if_crowded
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
    at = torch.from_numpy(np.array(batch["positions"])).long().to(model.device)[:, :, None]
    # Logits at all positions of an image's prompt are much larger than those of the answers, and `logits_to_keep` of
    # some versions keeps the positions of all rows for each of them.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, states: torch.take_along_dim(states[0], at, dim=1)
    )
    try:
        with torch.no_grad():
            logits = model(**tensors).logits.cpu().numpy()
    finally:
        hook.remove()
    return np.where(batch["targets"][:, :, None] == -100, 0.0, logits)


def split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a training batch into model inputs with answers, and prompts alone."""
    inputs = {
        name: batch[name] for name in ("images", "input_ids", "attention_mask", "decoder_input_ids") if name in batch
    }
    prompt = {"images": batch["images"]}
    prompt |= {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
    return inputs, prompt


def torch_tensors(model, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a batch to PyTorch tensors: images in the family's format, ids and masks as int64."""
    import torch

    pixels = torch_images(arrays, model.config) if "images" in arrays else {}
    rest = {name: array for name, array in arrays.items() if name != "images"}
    # Copies, because PyTorch warns about read-only arrays such as JAX's.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in {**pixels, **rest}.items()}
    tensors = {name: t.long() if name.endswith(("ids", "mask")) else t for name, t in tensors.items()}
    return {name: t.to(model.device) for name, t in tensors.items()}


def greedy_answers(model, prompt: Mapping[str, np.ndarray], max_new_tokens: int, pad: int, **options) -> np.ndarray:
    """Generates greedy answers with PyTorch, on the device of the model.

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
        ids = model.generate(**torch_tensors(model, prompt), max_new_tokens=max_new_tokens, do_sample=False, **options)
    ids = ids.cpu().numpy()
    start = 1 if model.config.get_text_config().is_encoder_decoder else prompt["input_ids"].shape[1]
    ids = ids[:, start:]
    return np.pad(ids, ((0, 0), (0, max_new_tokens - ids.shape[1])), constant_values=pad)


torch_answers = on_cpu_if_crowded(greedy_answers)
"""`greedy_answers`, on the CPU if a GPU has no room for them beside JAX."""


@on_cpu_if_crowded
def torch_gap(model, prompt: Mapping[str, Any], step: int, ids: tuple[int, int]) -> float:
    """Returns the difference of PyTorch's logits of two tokens in a greedy answer.

    Args:
        model: from `torch_model`.
        prompt: `images`, `input_ids`, `attention_mask` of one row.
        step: number of the token in the answer, from 0.
        ids: the two tokens.

    Returns:
        Magnitude of the difference; infinity if the answer ends before.
    """
    import torch

    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        steps = model.generate(**torch_tensors(model, prompt), max_new_tokens=step + 1, **options).logits
    if len(steps) <= step:
        return float("inf")
    one, other = (float(steps[step][0, token]) for token in ids)
    return abs(one - other)
