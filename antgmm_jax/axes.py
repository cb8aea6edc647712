"""Axes that can be pruned, declared on the fields of a config.

A field made by `axis` counts units that can be removed. A field made by `part` holds another config and prefixes the
names of its axes: `part("vision")` around a stack with the axis `mlp` declares "vision/mlp".
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from antgmm_jax.errors import AntgmmError

Config = TypeVar("Config")


class Part(NamedTuple):
    """Metadata of a config field that holds a part of a model.

    Attributes:
        name: prefix of the part's axis names.
        embed: name of its width axis; parts of equal width share one name.
        tokens: what it processes: "images" (image slots), "text" (the prompt) or "answers".
        memory: width axis of the states that its cross-attention reads; "" without cross-attention.
        reads: tokens of those states: a key of `LMMConfig.tokens` or a part; "" without cross-attention.
    """

    name: str
    embed: str
    tokens: str
    memory: str = ""
    reads: str = ""


def axis(*, default: Any = MISSING) -> Any:
    """Declares a config field that counts removable units; a count of 0 declares no axis."""
    return field(default=default, metadata={"axis": True})


def part(name: str, *, tokens: str, embed: str = "", memory: str = "", reads: str = "", default: Any = MISSING) -> Any:
    """Declares a config field with axis names that start with `name`; see `Part` for the arguments."""
    fixed = Part(name, embed or f"{name}/embed", tokens, memory, reads)
    return part_by(lambda owner: fixed, default=default)


def part_by(choose: Callable[[Any], Part], *, default: Any = MISSING) -> Any:
    """Declares a `part` that `choose` computes from the config that holds the field."""
    return field(default=default, metadata={"part": choose})


class Node(NamedTuple):
    """A nested config and its place in the outermost one.

    Attributes:
        config: the nested dataclass.
        part: the part that it belongs to, or None.
        path: field names that lead to it.
    """

    config: Any
    part: Part | None
    path: tuple[str, ...]


def nodes(config: Any, parent: Part | None = None, path: tuple[str, ...] = ()) -> Iterator[Node]:
    """Iterates over a config and all configs nested in it, in field order."""
    yield Node(config, parent, path)
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from nodes(value, _part(config, item, parent), (*path, item.name))


def _part(owner: Any, item: dataclasses.Field, parent: Part | None) -> Part | None:
    return item.metadata["part"](owner) if "part" in item.metadata else parent


def _axes(node: Any, parent: Part | None) -> Iterator[tuple[str, str]]:
    """Field name and full axis name of each axis declared directly on a dataclass."""
    if parent is not None:
        for item in fields(node):
            if item.metadata.get("axis") and getattr(node, item.name):
                yield item.name, parent.embed if item.name == "embed" else f"{parent.name}/{item.name}"


def sizes(config: Any) -> dict[str, int]:
    """Returns the current size of every axis that can be pruned; `resize` sets sizes.

    Args:
        config: model config.

    Returns:
        Axis name -> number of units, stacks first. `heads` counts key-value heads.
    """
    return dict(_sizes(config))


@lru_cache(maxsize=1024)
def _sizes(config: Any) -> Mapping[str, int]:
    """The same, cached: a search for sizes asks for those of the same configs thousands of times."""
    stacks: dict[str, int] = {}
    single: dict[str, int] = {}
    for node in nodes(config):
        declared = {name: getattr(node.config, local) for local, name in _axes(node.config, node.part)}
        # A stack declares several axes, a bridge's MLP only one.
        (stacks if len(declared) > 1 else single).update(declared)
    return {**stacks, **{name: size for name, size in single.items() if name not in stacks}}


def resize(config: Config, new: Mapping[str, int]) -> Config:
    """Returns a config with new axis sizes; `families.violations` checks whether they are legal.

    Args:
        config: model config.
        new: axis name -> size; other axes keep their size.

    Returns:
        A new config.

    Raises:
        AntgmmError: the model has no such axis.
    """
    known = sizes(config)
    if unknown := sorted(set(new) - set(known)):
        raise AntgmmError(f"unknown axis {', '.join(unknown)}: this model has {', '.join(known)}")
    return _resized(config, None, new)


def _resized(config: Any, parent: Part | None, new: Mapping[str, int]) -> Any:
    changes = {local: new[name] for local, name in _axes(config, parent) if name in new}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            inner = _resized(value, _part(config, item, parent), new)
            changes |= {} if inner is value else {item.name: inner}
    return replace(config, **changes) if changes else config


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to plain JSON types; `read_dict` reads them back."""
    return dataclasses.asdict(config)


_OLD = {"cross_embed", "dynamic"}
"""Fields that older releases also stored: the width that cross-attention reads, and a factor of long texts."""


def read_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a config from the output of `to_dict`.

    Args:
        kind: dataclass of the config.
        values: field name -> value.

    Returns:
        The config.

    Raises:
        TypeError: a field is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    known = {name: value for name, value in values.items() if name not in _OLD}
    read = {name: _read(hints[name], value) if name in hints else value for name, value in known.items()}
    if wrong := [name for name, value in read.items() if name in hints and not _fits(hints[name], value)]:
        raise TypeError(f"{wrong[0]} = {read[wrong[0]]!r}")
    return kind(**read)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has the type of a field: a number, a text, a dataclass, or a choice or tuple of these."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(hint)[0], item) for item in value)
    if get_args(hint):
        return any(_fits(option, value) for option in get_args(hint))
    return type(value) in ((int, float) if hint is float else (hint,))


def _read(hint: Any, value: Any) -> Any:
    options = [option for option in (hint, *get_args(hint)) if isinstance(option, type) and is_dataclass(option)]
    if options and isinstance(value, Mapping):
        fitting = (option for option in options if {item.name for item in fields(option)} >= {*value} - _OLD)
        return read_dict(next(fitting, options[0]), value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    """Converts lists to tuples, nested: JSON has no tuples, a config no lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
