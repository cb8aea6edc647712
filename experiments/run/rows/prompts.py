"""Prompt templates, which are stored next to the files of a checkpoint."""

from pathlib import Path

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import read_json
from antgmm_jax.io.hub import local
from data.record import PROMPT, check_template
from experiments.run.files import write_json
from experiments.run.schema import Recipe, Training

TEMPLATES = (
    PROMPT,
    "[{text} ]{question}",
    "[{text} ]Question: {question} Answer:",
    "[{text} ]{question}\nAnswer the question using a single word or phrase.",
)
"""Prompts among which one is chosen for a checkpoint that records none: the default, the question alone, and two that
models are often trained with for short answers."""
NOTE = "antgmm.json"
"""File with the prompt template in a Hugging Face directory; `transformers` ignores it."""


def note_prompt(directory: Path, template: str) -> None:
    """Stores the prompt template of a checkpoint.

    Args:
        directory: Hugging Face directory.
        template: prompt template.
    """
    write_json(directory / NOTE, {"prompt": template})


def records_prompt(directory: str | Path) -> bool:
    """Whether a checkpoint records its prompt template.

    Args:
        directory: Hugging Face directory, or a name of the Hub.
    """
    return (local(directory) / NOTE).exists()


def noted_prompt(directory: str | Path) -> str:
    """Returns the prompt template of a checkpoint.

    Args:
        directory: Hugging Face directory, or a name of the Hub.

    Returns:
        The stored template, or else the default.

    Raises:
        AntgmmError: the file is invalid.
    """
    note = local(directory) / NOTE
    try:
        return check_template(read_json(note)["prompt"]) if note.exists() else PROMPT
    except (ValueError, KeyError, TypeError) as error:
        raise AntgmmError(f'{note} is not {{"prompt": TEMPLATE}}: {error}') from error


def prompt_of(recipe: Recipe | Training) -> str:
    """Returns the prompt template of a recipe.

    Args:
        recipe: the recipe.

    Returns:
        The recipe's template, else that of the initial checkpoint, else the default.

    Raises:
        AntgmmError: as in `noted_prompt`.
    """
    return recipe.prompt or (noted_prompt(recipe.start) if recipe.start else PROMPT)
