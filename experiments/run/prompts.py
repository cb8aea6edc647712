"""How a checkpoint is asked: noted beside its files, where whoever serves or cuts it finds the words."""

import json
from pathlib import Path

from antgmm_jax.errors import AntgmmError
from data.record import PROMPT, check_template
from experiments.run.folder import write_json
from experiments.run.schema import Recipe, Training

NOTE = "antgmm.json"
"""File of a Hugging Face directory that `transformers` does not read."""


def note_prompt(directory: Path, template: str) -> None:
    """Notes how the model in a directory was asked.

    Args:
        directory: its Hugging Face directory.
        template: of its prompts.
    """
    write_json(directory / NOTE, {"prompt": template})


def noted_prompt(directory: str | Path) -> str:
    """How the model in a directory is asked.

    Args:
        directory: its Hugging Face directory.

    Returns:
        The template that is noted there, or else the usual one.

    Raises:
        AntgmmError: the note is none.
    """
    note = Path(directory) / NOTE
    try:
        return check_template(json.loads(note.read_text())["prompt"]) if note.exists() else PROMPT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AntgmmError(f'{note} is not {{"prompt": TEMPLATE}}: {error}') from error


def prompt_of(recipe: Recipe | Training) -> str:
    """How the model of a recipe is asked.

    Args:
        recipe: the recipe.

    Returns:
        The recipe's own template, else that of the checkpoint it starts from, else the usual one.

    Raises:
        AntgmmError: as `noted_prompt`.
    """
    return recipe.prompt or (noted_prompt(recipe.start) if recipe.start else PROMPT)
