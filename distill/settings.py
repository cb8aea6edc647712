"""Settings that check what they hold, alike in Python and in a recipe that embeds them."""

import functools
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from antgmm_jax.errors import AntgmmError

Settings = TypeVar("Settings")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[Settings]) -> type[Settings]:
    """Makes a class a frozen dataclass with keyword arguments, whose annotations say what its fields may hold.

    Made in Python, it raises `AntgmmError` in one line for what its annotations or validators refuse; as a field of a
    Pydantic model, its faults are the model's, with the path of the key.

    Args:
        cls: a class with annotated fields, as `pydantic.dataclasses.dataclass` takes it.

    Returns:
        The dataclass.
    """
    checked: Any = dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    plain = checked.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **fields: Any) -> None:
        try:
            plain(self, *args, **fields)
        except ValidationError as error:
            raise AntgmmError(f"{cls.__name__}: {'; '.join(map(_told, error.errors()))}") from None

    checked.__init__ = init
    return checked


def _told(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where} = {fault['input']!r}: {message}" if where else message
