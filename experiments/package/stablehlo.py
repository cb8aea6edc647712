"""An exported model as a .stablehlo file, which JAX runs: the whole request as one program for each shape of prompts.

The file is a safetensors file with the weights once, and the programs (`jax.export`) as bytes; `loader` reads it.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array, export
from safetensors.numpy import save_file

from antgmm_jax.blocks.pictures import from_hf
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import forced_logits, generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family, torch_images
from antgmm_jax.io.files import one_line
from antgmm_jax.io.hub import local
from antgmm_jax.io.leaves import named_leaves
from antgmm_jax.io.loading import hf_config
from antgmm_jax.io.placed import on_devices
from antgmm_jax.pure import Params
from experiments.package.build import Form
from experiments.package.loader import ABOUT, CHECKSUMS, PROGRAM, WEIGHTS, Package, checksum, checksum_of
from experiments.package.requests import Limits, Prompt, Shape
from experiments.package.times import whole
from experiments.report.latency import Request
from experiments.run.export.export_gate import answer_logits
from experiments.run.export.in_torch import split
from experiments.run.host.console import bar

PLATFORMS = ("cpu", "cuda", "tpu")
"""Each program runs on all of them. Computing in float32, no part of it was traced for one of them alone."""


def stablehlo(directory: Path, config: LMMConfig, params: Params, limits: Limits) -> Form:
    """Returns the form of .stablehlo files, compared with the decoding of `antgmm eval`, in float32.

    Args:
        directory: Hugging Face directory of the model.
        config: model config.
        params: parameters in the dtypes of the files.
        limits: how answers end.

    Raises:
        AntgmmError: images of this family are not squares without a place and text of their own.
    """
    if config.usual_place is not None or config.instruction:
        servers = "antgmm serve" if family(config).vllm(config) is None else "vLLM or antgmm serve"
        raise AntgmmError(
            f"a {config.family} has no .stablehlo package: its images have places or text of their own;"
            f" serve the files with {servers}"
        )
    hf, left = hf_config(local(directory)), not config.encoder_decoder
    exact = on_devices(config, params, "float32")
    opened = lru_cache(maxsize=1)(Package)  # one file holds the programs of all shapes

    def answers(prompt: Prompt) -> np.ndarray:
        ends: dict[str, Any] = {"max_new_tokens": limits.tokens, "eos": limits.eos, "pad": limits.pad}
        return np.asarray(generate(config, exact, prompt, **ends))

    def logits(batch: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(answer_logits(config, exact, split(batch)[0], batch["positions"]))

    def gap(prompt: Prompt, step: int, ids: tuple[int, int]) -> float:
        answer = answers(prompt)
        if np.isin(answer[:, :step], limits.eos).any():
            return float("inf")
        logits = forced_logits(config, exact, prompt, answer)[0, step]
        return abs(float(logits[ids[0]]) - float(logits[ids[1]]))

    def load(file: Path, shape: Shape) -> Callable[[Prompt], np.ndarray]:
        del shape  # its program is the smallest that holds such prompts
        package = opened(file)
        return lambda prompt: package(_as_processed(prompt, hf))

    def write(examples: Mapping[Shape, Prompt], file: Path) -> None:
        arrays = {WEIGHTS + name: np.asarray(leaf) for name, (_, leaf) in named_leaves(params).items()}
        remedy = "serve the files with antgmm serve"
        with bar("tracing programs", len(examples)) as update, one_line(lambda: "JAX cannot export the model", remedy):
            for number, (shape, prompt) in enumerate(examples.items()):
                program = _program(config, exact, _as_processed(prompt, hf), _slots(prompt), limits)
                arrays[f"{PROGRAM}{shape}"] = np.frombuffer(program, np.uint8)
                update(number + 1, "")
        about = {**limits.text(), "image_token": str(config.image_token), "side": "left" if left else "right"}
        about["image_tokens"] = str(config.image_tokens)
        about["jax"] = jax.__version__
        sums = {name: checksum(values) for name, values in arrays.items()} | {ABOUT: checksum_of(about)}
        with one_line(lambda: f"{file.name} cannot be written", "free disk space or choose another folder"):
            save_file(arrays, file, metadata={**about, CHECKSUMS: json.dumps(sums)})

    def requests(file: Path, shape: Shape, prompt: Prompt) -> dict[str, Request]:
        """Requests that stop at the end of the longest answer, as the program does."""
        del shape
        package, inputs = opened(file), _as_processed(prompt, hf)
        return {"JAX": whole(lambda: answers(prompt)), "package": whole(lambda: package(inputs))}

    return Form("JAX", left, answers, logits, gap, write, load, requests)


def _slots(prompt: Prompt) -> int:
    """Image slots of each row."""
    return prompt["images"]["valid"].shape[1]


def _as_processed(prompt: Prompt, hf: Any) -> dict[str, np.ndarray]:
    """Prompts as the Hugging Face processor gives them."""
    images = torch_images(prompt, hf) if prompt["images"]["valid"].any() else {}
    text = {name: np.asarray(prompt[name]) for name in ("input_ids", "attention_mask")}
    return text | {name: values for name, values in images.items() if name == "pixel_values"}


def _program(config: LMMConfig, params: Params, inputs: Mapping[str, np.ndarray], slots: int, limits: Limits) -> bytes:
    """Serializes the program (weights, inputs) -> answers for inputs of given shapes.

    Args:
        config: model config.
        params: parameters in the dtype of computation.
        inputs: outputs of the processor.
        slots: image slots of each row.
        limits: how answers end.
    """
    rows = len(inputs["input_ids"])

    def request(weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        images: Mapping[str, Any] = {"valid": jnp.zeros((rows, 0), bool)}
        if "pixel_values" in inputs:
            used = ((ids == config.image_token) & (mask > 0)).sum(axis=1) // config.image_tokens
            images = from_hf(inputs["pixel_values"], used, slots)
        batch = {"images": images, "input_ids": ids, "attention_mask": mask}
        named = unflatten_dict(weights, sep=".")
        return generate(config, named, batch, max_new_tokens=limits.tokens, eos=limits.eos, pad=limits.pad)

    def kind(values: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(values.dtype))

    weights = {name: kind(leaf, leaf.shape) for name, (_, leaf) in named_leaves(params).items()}
    arguments = {name: kind(values, values.shape) for name, values in inputs.items()}
    if "pixel_values" in inputs and inputs["pixel_values"].ndim == 4:  # slots of all rows, of which some may be unused
        arguments["pixel_values"] = kind(inputs["pixel_values"], (rows * slots, *inputs["pixel_values"].shape[1:]))
    return bytes(export.export(jax.jit(request), platforms=PLATFORMS)(weights, arguments).serialize())
