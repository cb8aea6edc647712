"""Quantized copies of an export in the format of compressed-tensors, which vLLM and transformers load.

Weights are rounded to the nearest number of each row or group, activations at each token as the model runs, so no rows
are needed. Only the matrices in the layers of the language model are quantized; image side, head and token table keep
their dtype, as is usual.
"""

import io
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from math import gcd
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from loguru import logger
from transformers import PreTrainedModel

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import layer_tensors, open_hf
from antgmm_jax.io.files import one_line
from antgmm_jax.io.loading import CONFIG
from antgmm_jax.io.tensors import Tensors
from experiments.run.export.in_torch import empty_model
from experiments.run.export.schemes import GROUPS, Scheme, check_scheme

_PRESETS = {"w8a8": "W8A8", "w4a16": "W4A16", "fp8": "FP8_DYNAMIC"}
"""Names of schemes, ours and the library's."""
_WEIGHT = ".weight"


_JOINED = (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj"))
"""Maps that vLLM joins, and the name of the whole: not for every model it finds the parts among those to leave out."""


def quantize(directory: Path, out: Path, scheme: str) -> list[int]:
    """Writes a quantized copy of an export; the other files of the folder are copied.

    Args:
        directory: Hugging Face directory.
        out: folder to create.
        scheme: value of `schemes.Scheme`.

    Returns:
        Numbers of inputs for which servers have no kernel, ascending: with four bits those that no group divides.

    Raises:
        AntgmmError: names in transformers do not correspond to the files, transformers does not run the scheme, or the
            disk is full.
    """
    config, _ = open_hf(directory)
    check_scheme(config, Scheme(scheme))
    stored = Tensors(directory, ())
    shapes = {name: stored.spec(name).shape for name in stored.names if name.endswith(_WEIGHT)}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    matrices = shapes.keys() & {*layer_tensors(config, "language")}
    inputs = {shapes[name][1] for name in matrices}
    chosen = _scheme(scheme, inputs)
    # Names in transformers and in the files: servers read either.
    ignored = [
        *_outside(directory, len(matrices)),
        *(name.removesuffix(_WEIGHT) for name in sorted({*shapes} - matrices)),
    ]
    ignored += [
        f"{name.removesuffix(part)}{whole}" for name in ignored for part, whole in _JOINED if name.endswith(part)
    ]
    with _quiet(), one_line(lambda: f"{out} cannot be written", "free disk space or choose another folder"):
        convert_checkpoint(directory, out, _Quantizer(chosen, matrices, [*dict.fromkeys(ignored)]), device="cpu")
    for weights in out.glob("*.safetensors"):  # which the library leaves to their owner alone
        shutil.copymode(directory / CONFIG, weights)
    four = chosen.weights is not None and chosen.weights.num_bits == 4
    return sorted(size for size in inputs if four and size % GROUPS[-1])


def _scheme(scheme: str, inputs: Collection[int]) -> QuantizationScheme:
    """The scheme of the library; four bits have a scale for each group of weights that divides all inputs, or row."""
    chosen = preset_name_to_scheme(_PRESETS[scheme], ["Linear"])
    args = chosen.weights
    if args is not None and args.group_size:
        size = next((size for size in GROUPS if gcd(*inputs) % size == 0), None)
        by_row = {"group_size": None, "strategy": QuantizationStrategy.CHANNEL.value}
        chosen.weights = args.model_copy(update={"group_size": size} if size else by_row)
    return chosen


def _outside(directory: Path, inside: int) -> Iterator[str]:
    """Names in transformers of the linear maps that are not quantized: the image side and the heads.

    Args:
        directory: Hugging Face directory.
        inside: number of the others.
    """
    model = empty_model(directory)
    kind = type(model.config.get_text_config())
    roots = [
        f"{name}."
        for name, part in model.named_modules()
        if name and isinstance(part, PreTrainedModel) and type(part.config) is kind
    ]
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    outside = [name for name in linear if not name.startswith(tuple(roots)) or name.endswith("lm_head")]
    if len(linear) - len(outside) != inside:
        raise AntgmmError(
            f"{directory}: {len(linear) - len(outside)} linear maps of the language model in transformers are"
            f" {inside} matrices in its files, so it cannot be quantized: serve it as it is"
        )
    yield from outside


class _Quantizer:
    """Quantizes the tensors of a file: what `convert_checkpoint` calls, a `Converter` of the library."""

    def __init__(self, scheme: QuantizationScheme, names: Collection[str], ignored: list[str]):
        self._scheme, self._names, self._ignored = scheme, names, ignored
        self._format = infer_module_format(torch.nn.Linear, scheme)

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a file with those of `names` quantized."""
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            out |= self._quantized(name, tensor) if name in self._names else {name: tensor}
        return out

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors; they were checked before."""
        return tensors

    def get_dependencies(self, weight_name: str) -> set[str]:
        """Returns names of tensors that are needed together with another: none."""
        return set()

    def update_config(self, config: Any) -> QuantizationConfig:
        """Returns the settings for config.json."""
        return QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=self._format.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=self._ignored,
        )

    def update_model_config(self, model_config: dict) -> dict:
        """Returns the other fields of config.json."""
        return model_config

    def _quantized(self, name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        args = self._scheme.weights
        assert args is not None
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        compressor: Any = BaseCompressor.get_value_from_registry(self._format.value)
        module = name.removesuffix(_WEIGHT)
        return {
            f"{module}.{key}": value.contiguous() for key, value in compressor.compress(state, self._scheme).items()
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's logs and bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        logger.enable("compressed_tensors")
