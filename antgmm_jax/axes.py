"""Axes that can be cut: declared on the fields of a config, read by everything else.

A field made by `axis` counts units that can be removed. A field made by `part` holds a config whose axes are named
after that part: `part("vision")` around a stack with the axis `mlp` declares "vision/mlp".
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from antgmm_jax.errors import AntgmmError

Config = TypeVar("Config")


class Part(NamedTuple):
    """A part of a model, as the field that holds its config declares it.

    Attributes:
        name: first half of its axes' names.
        embed: name of its width axis; parts with one width share a name.
        tokens: what it processes: "images" (picture slots), "text" (the prompt) or "answers".
        memory: width axis of the states that its cross-attention reads; "" without.
        reads: which tokens those states are, a key of `LMMConfig.tokens` or a part; "" without.
    """

    name: str
    embed: str
    tokens: str
    memory: str = ""
    reads: str = ""


def axis(*, default: Any = MISSING) -> Any:
    """A config field that counts units which can be cut; a count of 0 declares no axis."""
    return field(default=default, metadata={"axis": True})


def part(name: str, *, tokens: str, embed: str = "", memory: str = "", reads: str = "", default: Any = MISSING) -> Any:
    """A config field whose own axes are named after `name`; the arguments are those of `Part`."""
    fixed = Part(name, embed or f"{name}/embed", tokens, memory, reads)
    return part_by(lambda owner: fixed, default=default)


def part_by(choose: Callable[[Any], Part], *, default: Any = MISSING) -> Any:
    """A `part` that depends on the config which holds the field."""
    return field(default=default, metadata={"part": choose})


class Node(NamedTuple):
    """A config inside another.

    Attributes:
        config: the dataclass.
        part: the part that it belongs to; None outside of all.
        path: the fields that lead to it.
    """

    config: Any
    part: Part | None
    path: tuple[str, ...]


def nodes(config: Any, belongs: Part | None = None, path: tuple[str, ...] = ()) -> Iterator[Node]:
    """Every dataclass of a config, in the order of its fields."""
    yield Node(config, belongs, path)
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from nodes(value, _part(config, one, belongs), (*path, one.name))


def _part(owner: Any, one: dataclasses.Field, belongs: Part | None) -> Part | None:
    return one.metadata["part"](owner) if "part" in one.metadata else belongs


def _axes(node: Any, belongs: Part | None) -> Iterator[tuple[str, str]]:
    """Field and global name of each axis that a dataclass itself declares."""
    if belongs is not None:
        for one in fields(node):
            if one.metadata.get("axis") and getattr(node, one.name):
                yield one.name, belongs.embed if one.name == "embed" else f"{belongs.name}/{one.name}"


def sizes(config: Any) -> dict[str, int]:
    """Every axis that can be cut, with its present size; `resize` is the way back.

    Args:
        config: the model.

    Returns:
        axis name -> number of units; `heads` counts key-value heads. Axes of stacks come first.
    """
    stacks: dict[str, int] = {}
    single: dict[str, int] = {}
    for node in nodes(config):
        own = {name: getattr(node.config, local) for local, name in _axes(node.config, node.part)}
        # A stack declares several axes, a bridge's perceptron one.
        (stacks if len(own) > 1 else single).update(own)
    return {**stacks, **{name: size for name, size in single.items() if name not in stacks}}


def resize(config: Config, new: Mapping[str, int]) -> Config:
    """The same model with some axes at other sizes; legality is `families.violations`' business.

    Args:
        config: the model.
        new: axis name -> size; axes not named keep theirs.

    Returns:
        A new config.

    Raises:
        AntgmmError: an axis that this model does not have.
    """
    known = sizes(config)
    if unknown := sorted(set(new) - set(known)):
        raise AntgmmError(f"unknown axis {', '.join(unknown)}: this model has {', '.join(known)}")
    return _resized(config, None, new)


def _resized(config: Any, belongs: Part | None, new: Mapping[str, int]) -> Any:
    changes = {local: new[name] for local, name in _axes(config, belongs) if name in new}
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            changes[one.name] = _resized(value, _part(config, one, belongs), new)
    return replace(config, **changes)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types."""
    return dataclasses.asdict(config)


def read_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The config of a type that `to_dict` wrote.

    Args:
        kind: its dataclass.
        values: field -> value.

    Returns:
        The config.
    """
    hints = get_type_hints(kind)
    # Records of former releases repeat the width that cross-attention reads.
    known = {name: value for name, value in values.items() if name != "cross_embed"}
    return kind(**{name: _read(hints[name], value) if name in hints else value for name, value in known.items()})


def _read(hint: Any, value: Any) -> Any:
    options = [option for option in (hint, *get_args(hint)) if isinstance(option, type) and is_dataclass(option)]
    return read_dict(options[0], value) if options and isinstance(value, Mapping) else value
