"""Loading and encoding of the records of a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import template_warning
from data.encoding import Encoder
from data.maad import source
from data.prepared import PreparedSource
from data.readers import read_records
from data.source import Source
from experiments.run.export.completion import positions
from experiments.run.host.console import say
from experiments.run.rows.prompts import prompt_of
from experiments.run.rows.samples import Samples
from experiments.run.schema import Data, PreparedData, Recipe, Training
from experiments.run.schema.tables import FileData

Result = TypeVar("Result")
Both = tuple[Result, Result]
"""For training, and for evaluation."""


def load_records(data: Data | PreparedData) -> Source:
    """Opens the records of a data table, without validating them.

    Args:
        data: data table of a recipe.

    Returns:
        `data.samples` records.

    Raises:
        AntgmmError: the data does not exist.
    """
    if data.kind == "maad":
        return source(data.tier, data.split, data.samples)
    if data.kind == "prepared":
        return PreparedSource(Path(data.path), data.samples)
    options = {"split": data.split, "most": data.samples, "drop_long": data.too_long == "drop"}
    images = data.images if isinstance(data, FileData) else ""
    return read_records(data.kind, Path(data.path), images=images, **options, spread=data.take == "spread")


def encoder_of(recipe: Recipe | Training, processor: ProcessorMixin, config: LMMConfig) -> Encoder:
    """Returns the encoder of a recipe's records, with its limits and prompt.

    Args:
        recipe: the recipe.
        processor: processor of the model.
        config: model config.
    """
    limits = {"max_length": recipe.max_length, "max_answer": recipe.max_answer}
    return Encoder(processor, config, **limits, template=prompt_of(recipe))


def load_both(recipe: Recipe | Training) -> Both[Source]:
    """Opens the records for training and for evaluation.

    Args:
        recipe: the recipe.

    Returns:
        Both sources.

    Raises:
        AntgmmError: lists the errors of both.
    """
    return _both(load_records, (recipe.data,), (recipe.evaluate.data,))


def encode_both(
    recipe: Recipe | Training, records: Both[Source], processor: ProcessorMixin, config: LMMConfig
) -> "Both[Samples]":
    """Encodes the records for training (with the recipe's buckets or packing) and for evaluation.

    Args:
        recipe: the recipe.
        records: from `load_both`.
        processor: processor of the model.
        config: model config.

    Returns:
        Both sets of samples.

    Raises:
        AntgmmError: lists the errors of both, or they are the same records.
    """

    def make(source: Source, trained: bool) -> Samples:
        return encoded(recipe, source, processor, config, trained=trained)

    samples = _both(make, (records[0], True), (records[1], False))
    check_apart(*records)
    warnings = (template_warning(processor), _position_warning(recipe, samples), *map(_version_warning, records))
    for warning in filter(None, warnings):
        say(f"warning: {warning}")
    return samples


def _position_warning(recipe: Recipe | Training, samples: "Both[Samples]") -> str:
    """A warning of rows that are longer than the decoder's positions; "" without one, or for a new model."""
    model = recipe.teacher.path if isinstance(recipe, Recipe) else recipe.start
    if not model or samples[0].encoder.inputs.encoder_decoder:
        return ""
    longest = positions(local(model))
    count = sum(int((each.needs.text > longest).sum()) for each in samples)
    rows = f"{count} rows for training and evaluation have more tokens than the {longest} positions of {model}"
    return f"{rows}: shorten or remove them" if count else ""


def _version_warning(source: Source) -> str:
    """A warning of rows that other versions have encoded, perhaps otherwise than a server will; "" without one."""
    other = source.other_versions() if isinstance(source, PreparedSource) else ""
    return f"{source.path} was prepared with {other}: prepare it again if they read rows otherwise" if other else ""


def check_apart(trained: Source, tests: Source) -> None:
    """Checks that a model is not evaluated on the records that it is trained on, such as a copy of their file.

    Args:
        trained: records for training, which are valid.
        tests: records for evaluation, which are valid.

    Raises:
        AntgmmError: they have rows in common.
    """
    if trained.overlaps(tests):
        raise AntgmmError(f"{tests.path} has the rows of {trained.path}: evaluate on other rows")


def encoded(
    recipe: Recipe | Training,
    records: Source,
    processor: ProcessorMixin,
    config: LMMConfig,
    *,
    trained: bool = False,
) -> "Samples":
    """Encodes records with the settings of a recipe.

    Args:
        recipe: the recipe.
        records: the records.
        processor: processor of the model.
        config: model config.
        trained: whether to use the recipe's buckets or packing, for training.

    Returns:
        The samples.

    Raises:
        AntgmmError: as in `Samples`.
    """
    rows = {"buckets": recipe.buckets, "prompt_buckets": recipe.prompt_buckets, "pack": recipe.pack} if trained else {}
    limits = {"max_length": recipe.max_length, "max_answer": recipe.max_answer}
    samples = Samples(records, processor, config, prompt=prompt_of(recipe), **limits, **rows)
    if dropped := samples.rows.dropped:
        say(f"{records.path}: {dropped} of {dropped + len(samples)} records are too long and are left out")
    return samples


def _both(make: Callable[..., Result], *arguments: tuple[Any, ...]) -> Both[Result]:
    """Calls a function twice; an error lists the errors of both calls."""
    results, errors = [], []
    for each in arguments:
        try:
            results.append(make(*each))
        except AntgmmError as error:
            errors += error.args
    if errors:
        raise AntgmmError(*errors)
    return results[0], results[1]
