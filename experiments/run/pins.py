"""Commits of the Hub names in a recipe, which a run stores when it starts."""

from typing import Any, TypeVar

from antgmm_jax.io import hub
from experiments.run.host.console import say
from experiments.run.schema import PreparedData, Recipe, Table, Training

Given = TypeVar("Given", bound=Recipe | Training)

PATHS = (
    ("teacher", "path"),
    ("model", "path"),
    ("data", "path"),
    ("evaluate", "data", "path"),
    ("evaluate", "hard", "path"),
)
"""Keys that can be names of the Hub."""


def pinned(recipe: Given, before: Recipe | Training | None) -> Given:
    """Returns the recipe with a commit in every Hub name, so that a resumed run reads the same files.

    Args:
        recipe: the recipe.
        before: the recipe of an earlier start of the run; its commits are kept for names without a revision.

    Returns:
        The recipe; other paths are unchanged.

    Raises:
        AntgmmError: a repository cannot be downloaded.
    """
    for keys in PATHS:
        table = _value(recipe, keys[:-1])
        if isinstance(table, PreparedData):  # `PreparedSource` refuses names of the Hub
            continue
        if path := _value(recipe, keys):
            recipe = _replaced(recipe, keys, _pinned(path, _value(before, keys), getattr(table, "kind", "")))
    return recipe


def _pinned(path: str, before: str | None, kind: str) -> str:
    name, earlier = hub.parse(path), hub.parse(before or "")
    if name is not None and earlier is not None and earlier.fixed and earlier._replace(revision="") == name:
        return str(earlier)
    if name is not None:
        say(f"{name}: downloading what the cache does not hold")
    return hub.pinned(path, kind)


def _value(table: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        table = getattr(table, key, None)
    return table


def _replaced(table: Any, keys: tuple[str, ...], value: str) -> Any:
    """A copy of a table with another value of a key."""
    first, *rest = keys
    new = _replaced(getattr(table, first), tuple(rest), value) if rest else value
    assert isinstance(table, Table)
    return table.model_copy(update={first: new})
