"""Records, templates, models and sizes as they are named on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antgmm_jax.errors import AntgmmError

if TYPE_CHECKING:
    from antgmm_jax.config import LMMConfig
    from data.source import Source

FORMS = "maad:TIER:SPLIT, jsonl:PATH, parquet:PATH, webdataset:PATH or tfds:PATH:SPLIT"
_KEYS = {
    "maad": ("tier", "split"),
    "jsonl": ("path",),
    "parquet": ("path",),
    "webdataset": ("path",),
    "tfds": ("path", "split"),
}


def template(text: str, model: Path) -> str:
    """The template of prompts that `--prompt` gives.

    Args:
        text: as `data.record.check_template` takes it; empty: what is noted beside the model, or the usual one.
        model: a Hugging Face directory.

    Returns:
        The template.

    Raises:
        AntgmmError: it is none.
    """
    from data.record import check_template
    from experiments.run.prompts import noted_prompt

    try:
        return check_template(text) if text else noted_prompt(model)
    except ValueError as error:
        raise AntgmmError(f"--prompt {error}") from None


def records(text: str, samples: int) -> "Source":
    """The records that `--data` names.

    Args:
        text: as in FORMS.
        samples: how many, the first ones; 0 for all of a user's own files, or the split's size in MAAD-synth.

    Returns:
        The records.

    Raises:
        AntgmmError: not of a known form, or what the reader refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    from data.maad.latents import SIZES
    from data.readers import read_records
    from experiments.run.datasets import load_records
    from experiments.run.schema import Data

    kind, _, rest = text.partition(":")
    # A path may hold a colon, a tier and a split do not.
    values = rest.rsplit(":", 1) if len(_KEYS.get(kind, ())) == 2 else [rest]
    if kind not in _KEYS or len(values) != len(_KEYS[kind]) or not all(values):
        raise AntgmmError(f"--data {text!r}: write it as {FORMS}")
    fields: dict[str, Any] = dict(zip(_KEYS[kind], values, strict=True))
    if not samples and kind != "maad":
        return read_records(kind, Path(fields["path"]), split=fields.get("split", ""))
    fields |= {"kind": kind, "samples": samples or SIZES.get(fields.get("split", ""), 1)}
    try:
        return load_records(TypeAdapter(Data).validate_python(fields))
    except ValidationError as error:
        fault = error.errors()[0]
        raise AntgmmError(f"--data {text!r}: {fault['loc'][-1]} = {fault['input']!r}: {fault['msg']}") from None


def name_of(model: Path | None, preset: str) -> str:
    """The name of the model that a command is about.

    Args:
        model: a Hugging Face directory, or None.
        preset: a preset's name, or "".

    Returns:
        The one of the two that is given.

    Raises:
        AntgmmError: not exactly one of the two is given.
    """
    if (model is None) == (not preset):
        raise AntgmmError("name a checkpoint directory or --preset, one of the two")
    return preset or str(model)


def config_of(model: Path | None, preset: str) -> "LMMConfig":
    """The config of the model that a command is about; `name_of` has checked the arguments.

    Args:
        model: a Hugging Face directory, or None.
        preset: a preset's name, used where `model` is None.

    Returns:
        Its config.

    Raises:
        AntgmmError: there is no such preset, or the directory cannot be read.
    """
    if model is None:
        from antgmm_jax.presets import preset as named

        return named(preset)
    from antgmm_jax.io.convert import open_hf

    return open_hf(model)[0]


def end_tokens(directory: Path) -> tuple[Any, int]:
    """The end token or tokens of a checkpoint's answers, and what pads behind them.

    Args:
        directory: a Hugging Face directory.

    Returns:
        eos and pad, from generation_config.json, else from config.json, else those of the architecture.
    """
    from transformers import AutoConfig

    path = directory / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    text = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()

    def token(name: str, absent: int) -> Any:
        found = (own.get(name), getattr(text, name, None), absent)
        return next(value for value in found if value is not None)

    pad = token("pad_token_id", 0)
    return token("eos_token_id", 1), pad if isinstance(pad, int) else pad[0]


def sizes_given(texts: Sequence[str]) -> dict[str, int | float]:
    """The sizes that `--size` names, each once.

    Args:
        texts: `AXIS=N`, a whole number of units, or a decimal as the fraction of them.

    Returns:
        axis -> size.

    Raises:
        AntgmmError: the first that is none.
    """
    from pydantic import TypeAdapter

    from experiments.run.schema import Axis, Size

    found: dict[str, int | float] = {}
    for text in texts:
        axis, _, value = text.partition("=")
        try:
            found |= TypeAdapter(dict[Axis, Size]).validate_python({axis: json.loads(value)})
        except ValueError:
            raise AntgmmError(
                f"--size {text!r}: write it as vision/layers=12, or as text/embed=0.5 for a fraction"
            ) from None
    return found
