"""Parsing of command-line values: records, templates, models and sizes."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antgmm_jax.errors import AntgmmError
from experiments.run.host.console import bar

if TYPE_CHECKING:
    from antgmm_jax.config import LMMConfig
    from data.source import Source
    from experiments.run.export.served_prompt import Conversation
    from experiments.run.rows.samples import Samples

FORMS = (
    "maad:TIER:SPLIT, jsonl:PATH, parquet:PATH, arrow:PATH, webdataset:PATH or tfds:PATH:SPLIT (PATH:images=DIR where"
    " the pictures are in another folder than the file)"
)
_KEYS = {
    "maad": ("tier", "split"),
    "jsonl": ("path",),
    "parquet": ("path",),
    "arrow": ("path",),
    "webdataset": ("path",),
    "tfds": ("path", "split"),
}
ANSWER_LENGTH = 32
"""Maximum length of answers unless right ones are longer, or if no tokenizer is known to count their tokens."""


def template(text: str, model: Path | None) -> str:
    """Returns the prompt template for `--prompt`.

    Args:
        text: a template, see `data.record.check_template`; "" for that of the model or the default.
        model: Hugging Face directory, or None.

    Returns:
        The template.

    Raises:
        AntgmmError: the template is invalid.
    """
    from data.record import PROMPT, check_template
    from experiments.run.rows.prompts import noted_prompt

    try:
        if text:
            return check_template(text)
        return PROMPT if model is None else noted_prompt(model)
    except ValueError as error:
        raise AntgmmError(f"--prompt {error}") from None


def records(text: str, samples: int, *, fewer: bool = False) -> "Source":
    """Opens the records for `--data`.

    Args:
        text: one of the forms of FORMS.
        samples: number of records, from the first; 0 for all.
        fewer: whether data with fewer records is taken as it is.

    Returns:
        The records.

    Raises:
        AntgmmError: an invalid value, or an error of the reader.
    """
    from pydantic import TypeAdapter, ValidationError

    from data.maad.latents import SIZES
    from data.readers import path_and_images, read_records
    from experiments.run.rows.datasets import load_records
    from experiments.run.schema import Data

    named, images = path_and_images(text)
    kind, _, rest = named.partition(":")
    # A path may contain a colon; a tier or a split does not.
    values = rest.rsplit(":", 1) if len(_KEYS.get(kind, ())) == 2 else [rest]
    if kind not in _KEYS or len(values) != len(_KEYS[kind]) or not all(values):
        raise AntgmmError(f"--data {text!r}: write it as {FORMS}")
    fields: dict[str, Any] = dict(zip(_KEYS[kind], values, strict=True))
    if not samples and kind != "maad":
        return read_records(kind, Path(fields["path"]), images=images, split=fields.get("split", ""))
    if fewer:
        samples = min(samples, len(records(text, 0)))
    fields |= {"images": images} if images else {}
    fields |= {"kind": kind, "samples": samples or SIZES.get(fields.get("split", ""), 1)}
    try:
        return load_records(TypeAdapter(Data).validate_python(fields))
    except ValidationError as error:
        fault = error.errors()[0]
        raise AntgmmError(f"--data {text!r}: {fault['loc'][-1]} = {fault['input']!r}: {fault['msg']}") from None


def check_rows(source: "Source") -> None:
    """Reads all records with their images.

    Args:
        source: the records.

    Raises:
        AntgmmError: lists every invalid row.
    """
    from data.building import read_all
    from data.store import THREADS

    with bar("checking the rows", len(source)) as update:
        deque(read_all(source, lambda record: None, update, threads=THREADS), maxlen=0)


def answer_length(questions: "Samples | None") -> int:
    """Returns a maximum length of answers that lets every right answer be given, at least `ANSWER_LENGTH`.

    Args:
        questions: encoded rows; None if no tokenizer is known, so that right answers are not counted.
    """
    return ANSWER_LENGTH if questions is None else max(ANSWER_LENGTH, int(questions.rows.index.answer.max()))


def name_of(model: Path | None, preset: str) -> str:
    """Returns the name of the checkpoint or preset.

    Args:
        model: Hugging Face directory, or None.
        preset: name of a preset, or "".

    Returns:
        Name of the one that is given.

    Raises:
        AntgmmError: not exactly one of the two is given.
    """
    if (model is None) == (not preset):
        raise AntgmmError("specify either a checkpoint directory or --preset")
    return preset or str(model)


def config_of(model: Path | None, preset: str) -> "LMMConfig":
    """Returns the config of a checkpoint or a preset; `name_of` checks the arguments.

    Args:
        model: Hugging Face directory, or None.
        preset: name of a preset, used if `model` is None.

    Returns:
        Model config.

    Raises:
        AntgmmError: there is no such preset, or the checkpoint cannot be read.
    """
    if model is None:
        from antgmm_jax.presets import preset as named

        return named(preset)
    from antgmm_jax.io.headers import describe

    return describe(model)[0]


def dtypes(params: Any) -> list[str]:
    """Returns the names of the parameters' dtypes, sorted."""
    import jax

    return sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})


def sizes_given(texts: Sequence[str]) -> dict[str, int | float]:
    """Parses the values of `--size`.

    Args:
        texts: `AXIS=N` with a number of units, or a fraction with a decimal point.

    Returns:
        axis -> size.

    Raises:
        AntgmmError: a value is invalid.
    """
    from pydantic import TypeAdapter

    from experiments.run.schema import Axis, Size

    sizes: dict[str, int | float] = {}
    for text in texts:
        axis, _, value = text.partition("=")
        if axis in sizes:
            raise AntgmmError(f"--size names {axis} twice: name it once")
        try:
            sizes |= TypeAdapter(dict[Axis, Size]).validate_python({axis: json.loads(value)})
        except (ValueError, RecursionError):
            raise AntgmmError(
                f"--size {text[:80]!r}: write it as vision/layers=12, or as text/embed=0.5 for a fraction"
            ) from None
    return sizes


def check_prompts(
    config: "LMMConfig", like: Path, data: str, samples: int, prompt: str, max_new_tokens: int
) -> tuple[list[Mapping[str, Any]], list["Conversation"], int]:
    """Returns prompts for the check of an export or a package.

    Args:
        config: model config.
        like: Hugging Face directory with the processor.
        data: one of the forms of FORMS; "" for random prompts.
        samples: number of prompts; fewer if there are fewer records.
        prompt: prompt template.
        max_new_tokens: maximum length of answers; 0 for that of `answer_length`.

    Returns:
        Training batches with the prompts alone under `prompt/`, conversations unless the prompts are random, and the
        maximum length of answers.
    """
    from antgmm_jax.io.loading import load_processor
    from experiments.run.batch_size import answering
    from experiments.run.export.served_prompt import CHECKED, conversations
    from experiments.run.rows.random_batches import random_batch
    from experiments.run.rows.samples import Samples

    if data:
        questions = Samples(records(data, samples, fewer=True), load_processor(like), config, prompt=prompt)
        tokens = max_new_tokens or answer_length(questions)
        fits = answering(config, min(32, len(questions)), tokens)
        return [*questions.questions(fits)], conversations(questions, CHECKED), tokens
    starts = range(0, samples, 32)
    batches = [random_batch(config, min(32, samples - start), seed=start // 32) for start in starts]
    numbered = zip(batches, starts, strict=True)
    tokens = max_new_tokens or answer_length(None)
    return [{**batch, "index": batch["index"] + start} for batch, start in numbered], [], tokens
