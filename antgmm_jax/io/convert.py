"""Conversion between Hugging Face checkpoints (safetensors only) and our configs and parameters."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from antgmm_jax.blocks.layers import ACTIVATIONS
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family, family_of, violations
from antgmm_jax.families.base import Family
from antgmm_jax.families.common.table import Entry
from antgmm_jax.io import folders
from antgmm_jax.io.companions import copy_companions
from antgmm_jax.io.files import one_line, read_json
from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import CONFIG, hf_config, read_config
from antgmm_jax.io.placed import on_devices
from antgmm_jax.io.stored import Stored
from antgmm_jax.io.tensors import Spec, Tensors, write
from antgmm_jax.parallel import processes
from antgmm_jax.pure import Params, abstract


def load_hf(directory: str | os.PathLike) -> tuple[LMMConfig, Params]:
    """Loads a Hugging Face checkpoint.

    Args:
        directory: folder with config.json and model.safetensors, or with shards and their index; or a name of the Hub
            such as hf:ORG/NAME, which `antgmm_jax.io.hub` downloads.

    Returns:
        Model config, and the parameters on the devices in the dtypes of the file, read tensor by tensor and split over
        the mesh if there is one. `open_hf` leaves them on disk.

    Raises:
        AntgmmError: an unsupported family; a missing, extra, wrongly shaped or non-finite tensor; a damaged file.
    """
    config, params = open_hf(directory)
    return config, on_devices(config, params)


def open_hf(
    directory: str | os.PathLike, *, on_read: Callable[[int], None] = lambda _: None
) -> tuple[LMMConfig, Params]:
    """Opens a Hugging Face checkpoint and reads values lazily, layer by layer.

    `pruning.magnitude`, `pruning.shrink` and `save_hf` process the returned `Stored` arrays one layer at a time, so the
    model need not fit into memory. Opening reads only the headers and, if the file has a head, compares it with the
    token table up to the first difference.

    Args:
        directory: as in `load_hf`.
        on_read: called with the number of bytes after each later read.

    Returns:
        Model config, and the parameters as `Stored` arrays in the dtypes of the file.

    Raises:
        AntgmmError: as in `load_hf`; for a damaged or non-finite tensor, when it is read.
    """
    directory = local(directory)
    raw, of = _raw_config(directory)
    files = of.files
    tensors = Tensors(directory, files.renames, on_read)
    present, head = tensors.names, files.head
    tables = [name for name in files.tokens if name in present]
    full = hf_config(directory, raw).to_dict()
    with one_line(lambda: f"{directory / CONFIG} cannot be used", "does it belong to this model?"):
        tied = files.says_tied(full)
        if head not in present and not tied:
            raise AntgmmError(
                f"{directory} has no tensor {head}, and its {CONFIG} does not tie the head to the token table: copy all"
                " files of the model, or correct tie_word_embeddings"
            )
        if head in present and tables:
            tied = tied and any(tensors.equal(head, name) for name in tables)
        config = of.from_hf(full, raw, tied=tied)
        _check_activations(config)
        layers, table, shapes = _layers(config), of.weights(config), abstract(config)
        _check_sizes(shapes)
    needed = {name for entry in table for name, _ in entry.tensors(layers)}
    unread = {name for name in present if files.unread(config, name)}
    if tied and head in present and not tables:  # the file holds the table under the name of the head
        (name,) = needed & {*files.tokens}
        present[name] = present.pop(head)
    _check_names(needed, tensors, files.ignored, allowed={head} if tied else set(), unread=unread)
    return config, _stored(table, layers, tensors, shapes)


def check_supported(directory: Path) -> None:
    """Checks by config.json alone that a checkpoint is supported, before its weights are downloaded.

    Args:
        directory: local folder with config.json.

    Raises:
        AntgmmError: it is not.
    """
    raw, of = _raw_config(directory)
    full = hf_config(directory, raw).to_dict()
    with one_line(lambda: f"{directory / CONFIG} cannot be used", "correct it"):
        _check_activations(of.from_hf(full, raw, tied=False))


def _raw_config(directory: Path) -> tuple[dict[str, Any], Family]:
    """config.json as written, and the family of the model, which is not quantized."""
    raw = read_config(directory)
    of = family_of(str(raw.get("model_type", "?")))
    if any(fields.get("quantization_config") for fields in (raw, raw.get("text_config") or {})):
        raise AntgmmError(
            f"{directory} is quantized, which only transformers and vLLM read: use the model that it was made of"
        )
    return raw, of


def _check_sizes(shapes: Params) -> None:
    for leaf in jax.tree.leaves(shapes):
        if min(leaf.shape, default=0) < 0:
            raise ValueError(f"a parameter would have the shape {leaf.shape}")


def _layers(config: LMMConfig) -> dict[str, int]:
    """Layers of each tower, and of the stacks whose number follows from other axes."""
    stacks = {name: tower.stack.layers for name, tower in towers(config).items()}
    return {**stacks, **family(config).depth.sizes(config)}


def _check_activations(config: LMMConfig) -> None:
    names = {name: tower.stack.act for name, tower in towers(config).items()}
    if projector := getattr(config.bridge, "act", None):  # of a bridge without a stack
        names["the projector"] = projector
    for part, name in names.items():
        if name not in ACTIVATIONS:
            raise AntgmmError(f"activation {name!r} of {part} is not supported: use one of {', '.join(ACTIVATIONS)}")


def _check_names(
    needed: set[str], tensors: Tensors, ignored: tuple[str, ...], *, allowed: set[str], unread: set[str]
) -> None:
    present = set(tensors.names)
    missing = sorted(needed - present)
    extra = sorted(n for n in present - needed - allowed - unread if not any(re.fullmatch(p, n) for p in ignored))
    if missing:
        raise AntgmmError(
            f"tensors missing from the checkpoint: {_some(missing)}; check that config.json belongs to the same model"
        )
    if extra:
        raise AntgmmError(
            f"unexpected tensors in the checkpoint: {_some(extra)}; check that config.json belongs to the same model"
        )


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _lookup(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _store(tree: dict, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _file_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The tensor's shape in the file, from the shapes of the parameters it holds."""
    return _to_file(entry, [np.broadcast_to(np.uint8(0), shape) for shape in shapes]).shape


def _to_file(entry: Entry, parts: list[np.ndarray]) -> np.ndarray:
    left, right = (side.strip() for side in entry.pattern.split("->"))
    if len(parts) > 1:
        # Fused parameters are stacked on axis n; without grouped queries, q has a group axis of size 1.
        parts = [part.reshape(parts[1].shape) for part in parts]
        return rearrange(np.stack(parts), f"{right} -> {left}")
    return rearrange(parts[0], f"{right} -> {left}")


def _from_file(entry: Entry, values: np.ndarray, shapes: list[tuple[int, ...]], part: int) -> np.ndarray:
    """One of the parameters in a tensor, from its part of the tensor, as a view in the file's memory order."""
    left, right = (side.strip() for side in entry.pattern.split("->"))
    fused = len(shapes) > 1
    axes = _composed(left, right.split(), (1, *shapes[1]) if fused else shapes[0])
    return rearrange(values, f"{left} -> {right}", **axes).reshape(shapes[part])


def _composed(left: str, names: list[str], shape: tuple[int, ...]) -> dict[str, int]:
    """Sizes of the axes that the file merges (in brackets), which einops needs to split them."""
    inside = set(" ".join(re.findall(r"\(([^)]*)\)", left)).split())
    return {name: size for name, size in zip(names, shape, strict=True) if name in inside}


def _stored(table: list[Entry], layers: dict[str, int], tensors: Tensors, target: Params) -> Params:
    params: Params = {}
    for entry in table:
        targets = [_lookup(target, path).shape for path in entry.paths]
        shapes = [shape[1:] if entry.tower else shape for shape in targets]
        names = {row: name for name, row in entry.tensors(layers)}
        dtype = _check_tensors(tensors, [*names.values()], _file_shape(entry, shapes))
        for part, (path, shape) in enumerate(zip(entry.paths, targets, strict=True)):
            read = partial(_read, entry, tensors, names, shapes, part)
            _store(params, path, Stored(shape, dtype, read, stacked=bool(entry.tower)))
    if jax.tree.structure(params) != jax.tree.structure(target):
        raise AssertionError("a conversion table leaves parameters uncovered")
    return params


def _check_tensors(tensors: Tensors, names: list[str], shape: tuple[int, ...]) -> np.dtype:
    """Checks that a tensor has the same dtype and the expected shape in all layers; returns the dtype."""
    dtype = tensors.spec(names[0]).dtype
    for name in names:
        spec = tensors.spec(name)
        if spec.shape != shape:
            raise AntgmmError(
                f"tensor {name} has shape {spec.shape}, config.json implies {shape}: are both of the same model?"
            )
        if spec.dtype != dtype:
            raise AntgmmError(f"tensor {name} is {spec.dtype}, other layers are {dtype}: convert them to one dtype")
    return dtype


def _read(
    entry: Entry, tensors: Tensors, names: dict[int, str], shapes: list[tuple[int, ...]], part: int, row: int
) -> np.ndarray:
    # Fused parameters follow one another in the file, so each can be read alone.
    return _from_file(entry, tensors.read(names[row], part, len(shapes)), shapes, part)


def hf_tensors(config: LMMConfig, params: Params, dtype: DTypeLike | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Converts parameters to Hugging Face tensors, one at a time.

    Args:
        config: model config.
        params: model parameters; of JAX arrays on the devices of several processes, all of them get each tensor.
        dtype: dtype of the tensors; None keeps that of the parameters.

    Yields:
        Tensor name and array.
    """
    for name, entry, row in _outline(config):
        parts = [_part(_lookup(params, path), row) for path in entry.paths]
        tensor = _to_file(entry, parts)
        yield name, np.ascontiguousarray(tensor.astype(dtype or tensor.dtype, copy=False))


def _outline(config: LMMConfig) -> Iterator[tuple[str, Entry, int]]:
    """Name, table entry and row of every tensor of the file, in the order of writing."""
    of, layers = family(config), _layers(config)
    for entry in of.weights(config):
        for name, row in entry.tensors(layers):
            yield name, entry, row
    if config.language.tied and of.files.writes_head(config):
        yield of.files.head, Entry(of.files.head, ("language/tokens",), "v d -> v d"), -1


def layer_tensors(config: LMMConfig, root: str) -> Iterator[str]:
    """Iterates over the names of the tensors in the layers of a part of the model.

    Args:
        config: model config.
        root: first key of its parameters, such as "language".

    Yields:
        Tensor names in the file.
    """
    for name, entry, row in _outline(config):
        if row >= 0 and entry.paths[0].startswith(f"{root}/"):
            yield name


def _part(leaf: Any, row: int) -> np.ndarray:
    if isinstance(leaf, Stored):
        return leaf.read(row)
    return processes.gather(leaf if row < 0 else leaf[row])


def _specs(config: LMMConfig, params: Params, dtype: DTypeLike | None) -> dict[str, Spec]:
    specs, known = {}, {}
    for name, entry, row in _outline(config):
        if entry not in known:
            leaves = [_lookup(params, path) for path in entry.paths]
            shape = _file_shape(entry, [tuple(leaf.shape if row < 0 else leaf.shape[1:]) for leaf in leaves])
            known[entry] = Spec(shape, np.dtype(dtype or np.result_type(*(leaf.dtype for leaf in leaves))))
        specs[name] = known[entry]
    return specs


def save_hf(
    config: LMMConfig,
    params: Params,
    directory: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
    dtype: DTypeLike | None = None,
) -> None:
    """Saves a checkpoint that stock `transformers` can load; the write is atomic.

    With `jax.distributed`, all processes must call it. They gather one tensor at a time, and the first one writes.

    Args:
        config: model config of a legal shape.
        params: model parameters, in memory or `Stored`.
        directory: folder to create; it must not exist.
        like: checkpoint folder to copy other config fields and the files of `companions.COMPANIONS` from, such as the
            tokenizer; None writes config and weights only.
        max_shard_size: larger weights are split into shards with an index.
        dtype: dtype of the tensors; None keeps that of each parameter.

    Raises:
        AntgmmError: the shape is not legal, the folder exists, a file to copy is a link, or the disk is full.
    """
    directory = Path(directory)
    broken = violations(config)
    if broken:
        raise AntgmmError(f"transformers cannot load this shape: {'; '.join(broken)}")
    specs = _specs(config, params, dtype)

    def save(tensors: Iterator[tuple[str, np.ndarray]]) -> None:
        with folders.new_folder(directory) as temporary:
            write(specs, tensors, temporary, max_shard_size)
            _write_config(config, specs, temporary, None if like is None else local(like))

    processes.run_on_first_with(hf_tensors(config, params, dtype), save)


def _write_config(config: LMMConfig, specs: Mapping[str, Spec], directory: Path, like: Path | None) -> None:
    dtypes = {str(spec.dtype) for spec in specs.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    base = {} if like is None else read_json(like / CONFIG)
    base.pop("transformers_version", None)
    for part in (base, *(value for value in base.values() if isinstance(value, dict))):
        for old in ("torch_dtype", "dtype"):  # servers read that of a part, which may be another one
            part.pop(old, None)
    fields = _with_copies(base, _merge(base, {**family(config).to_hf(config), "dtype": dtype}))
    (directory / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if like is not None:
        copy_companions(like, directory)


def _with_copies(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Changes copies of fields of `text_config` with them: some releases of transformers write these at the top too."""
    old, new = base.get("text_config") or {}, fields.get("text_config") or {}
    copied = {key for key in {*base} & {*old} & {*new} & {*fields} if base[key] == old[key] == fields[key]}
    return {**fields, **{key: new[key] for key in copied}}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `over`, nested; without a list by layer that `over` does not have.

    Rotary positions of the default type get no settings of another type.
    """
    merged = {key: value for key, value in base.items() if key != "layer_types"}
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("rope_type") != "default":
            value = _merge(old, value)
        merged[key] = value
    return merged
