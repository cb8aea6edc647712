"""Dataclasses that validate their fields, both in Python and as part of a recipe."""

import functools
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from antgmm_jax.errors import AntgmmError

Settings = TypeVar("Settings")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[Settings]) -> type[Settings]:
    """Turns a class into a frozen, keyword-only dataclass that validates its fields by their annotations.

    Created in Python, it raises a one-line `AntgmmError` for invalid values. As a field of a Pydantic model, its errors
    are part of the model's, with the path of the key.

    Args:
        cls: class with annotated fields, as for `pydantic.dataclasses.dataclass`.

    Returns:
        The dataclass.
    """
    validated: Any = dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    original = validated.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **fields: Any) -> None:
        try:
            original(self, *args, **fields)
        except ValidationError as error:
            raise AntgmmError(f"{cls.__name__}: {'; '.join(map(_line, error.errors()))}") from None

    validated.__init__ = init
    return validated


def _line(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where} = {fault['input']!r}: {message}" if where else message
