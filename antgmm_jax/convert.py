"""A Hugging Face directory <-> (config, params), tensor by tensor; only safetensors are read."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING

from antgmm_jax.config import LMMConfig, stacks
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, family_of, violations
from antgmm_jax.families.table import Entry
from antgmm_jax.functional import Params, abstract
from antgmm_jax.layers import ACTIVATIONS

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def load_hf(directory: str | os.PathLike) -> tuple[LMMConfig, Params]:
    """Reads a checkpoint as `transformers` saves it.

    Args:
        directory: holds config.json and model.safetensors, or shards with their index.

    Returns:
        The config, and the parameters as numpy arrays in the file's own dtypes.

    Raises:
        AntgmmError: another family; a missing, extra, misshapen or non-finite tensor; a damaged file.
    """
    directory = Path(directory)
    raw = _read_json(directory / CONFIG)
    family = family_of(raw.get("model_type", "?"))
    tensors = _Tensors(directory, family.RENAMES)
    head, tokens = family.TIED_HEAD
    tied = head not in tensors.names or (
        _says_tied(raw) and tokens in tensors.names and np.array_equal(tensors.read(head), tensors.read(tokens))
    )
    config = family.from_hf(_with_defaults(raw, directory), raw, tied=tied)
    _check_config(config)
    layers = {tower: stack.layers for tower, stack in stacks(config).items()}
    table = family.table(config)
    needed = {name for entry in table for name, _ in entry.tensors(layers)}
    _check_names(needed, tensors, family.IGNORED, allowed={head} if tied else set(), unread=_unread(config, tensors))
    return config, _assemble(table, layers, tensors, abstract(config))


def _says_tied(raw: Mapping[str, Any]) -> bool:
    # T5 has no field for it: there a head equal to the table is the table.
    return bool(raw.get("tie_word_embeddings", False)) or raw.get("text_config", {}).get("model_type") == "t5"


def _with_defaults(raw: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw)).to_dict()
    except Exception as error:
        line = " ".join(str(error).split())
        raise AntgmmError(f"{directory / CONFIG}: transformers refuses it: {line}") from error


def _check_config(config: LMMConfig) -> None:
    vision = config.vision
    if not isinstance(vision.image, int) or not isinstance(vision.patch, int) or vision.image % vision.patch:
        raise AntgmmError(
            f"image_size {vision.image} must be a whole number of patches of {vision.patch} pixels, square"
        )
    for tower, stack in stacks(config).items():
        if stack.act not in ACTIVATIONS:
            raise AntgmmError(
                f"activation {stack.act!r} of {tower} is not supported: known are {', '.join(ACTIVATIONS)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AntgmmError(f"{path} is missing: a Hugging Face checkpoint directory holds it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AntgmmError(f"{path} is not JSON ({error}): copy it again") from error


class _Tensors:
    """Tensors of one or more safetensors files by our spelling of their names, read one at a time."""

    def __init__(self, directory: Path, renames: tuple[tuple[str, str], ...]):
        if (directory / INDEX).exists():
            files = sorted(set(_read_json(directory / INDEX)["weight_map"].values()))
        elif (directory / WEIGHTS).exists():
            files = [WEIGHTS]
        else:
            raise AntgmmError(
                f"{directory} has no {WEIGHTS}: save it with safe_serialization (pickled weights are not read)"
            )
        self.names: dict[str, tuple[Any, str, Path]] = {}
        for file in files:
            path = directory / file
            if path.resolve().parent != directory.resolve():
                raise AntgmmError(
                    f"{directory / INDEX} names {file!r}, which is outside the checkpoint: mend the index"
                )
            try:
                handle = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise AntgmmError(
                    f"{path} cannot be read ({error}): the file is damaged or cut short, copy it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                ours = name
                for pattern, new in renames:
                    ours = re.sub(pattern, new, ours)
                self.names[ours] = (handle, name, path)

    def read(self, name: str) -> np.ndarray:
        handle, own, path = self.names[name]
        try:
            return handle.get_tensor(own)
        except SafetensorError as error:
            raise AntgmmError(f"{path}: tensor {own} cannot be read ({error}): copy the file again") from error


def _unread(config: LMMConfig, tensors: _Tensors) -> set[str]:
    """Image-encoder layers after the one that LLaVA reads: in the file, but never run."""
    prefix = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")
    matches = ((name, prefix.match(name)) for name in tensors.names)
    return {name for name, m in matches if m and int(m[1]) >= config.vision.stack.layers}


def _check_names(
    needed: set[str], tensors: _Tensors, ignored: tuple[str, ...], *, allowed: set[str], unread: set[str]
) -> None:
    present = set(tensors.names)
    missing = sorted(needed - present)
    extra = sorted(n for n in present - needed - allowed - unread if not any(re.fullmatch(p, n) for p in ignored))
    if missing:
        raise AntgmmError(f"tensors missing from the checkpoint: {_some(missing)}; is config.json of the same model?")
    if extra:
        raise AntgmmError(f"tensors that config.json has no place for: {_some(extra)}; is it of the same model?")


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
    return _to_file(entry, [np.broadcast_to(np.float32(0), shape) for shape in shapes]).shape


def _to_file(entry: Entry, parts: list[np.ndarray]) -> np.ndarray:
    left, right = (side.strip() for side in entry.pattern.split("->"))
    if len(parts) > 1:
        # Fused parameters lie on axis n; heads of a stack without grouped queries carry a group axis of 1.
        parts = [part.reshape(parts[1].shape) for part in parts]
        return rearrange(np.stack(parts), f"{right} -> {left}")
    return rearrange(parts[0], f"{right} -> {left}")


def _from_file(entry: Entry, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    left, right = (side.strip() for side in entry.pattern.split("->"))
    names = right.split()
    shape = shapes[0]
    if len(shapes) > 1:
        shape = (len(shapes), *shapes[1])
    value = rearrange(tensor, f"{left} -> {right}", **_composed(left, names, shape))
    parts = list(value) if len(shapes) > 1 else [value]
    return [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]


def _composed(left: str, names: list[str], shape: tuple[int, ...]) -> dict[str, int]:
    """Sizes of the axes that the file composes in brackets: einops cannot split those by itself."""
    inside = set(" ".join(re.findall(r"\(([^)]*)\)", left)).split())
    return {name: size for name, size in zip(names, shape, strict=True) if name in inside}


def _assemble(table: list[Entry], layers: dict[str, int], tensors: _Tensors, target: Params) -> Params:
    params: Params = {}
    for entry in table:
        targets = [_lookup(target, path).shape for path in entry.paths]
        shapes = [shape[1:] if entry.tower else shape for shape in targets]
        expected = _file_shape(entry, shapes)
        for name, row in entry.tensors(layers):
            tensor = tensors.read(name)
            if tensor.shape != expected:
                raise AntgmmError(
                    f"tensor {name} has shape {tensor.shape}, config.json implies {expected}: is it of the same model?"
                )
            if not np.isfinite(tensor).all():
                raise AntgmmError(f"tensor {name} holds a NaN or infinity: the checkpoint is damaged, use another")
            for path, shape, part in zip(entry.paths, targets, _from_file(entry, tensor, shapes), strict=True):
                if row < 0:
                    _store(params, path, np.ascontiguousarray(part))
                    continue
                if row == 0:
                    _store(params, path, np.empty(shape, tensor.dtype))
                stacked = _lookup(params, path)
                if stacked.dtype != tensor.dtype:
                    raise AntgmmError(
                        f"tensor {name} is {tensor.dtype}, its other layers {stacked.dtype}: convert to one"
                    )
                stacked[row] = part
    if jax.tree.structure(params) != jax.tree.structure(target):
        raise AssertionError("a conversion table leaves parameters uncovered")
    return params


def hf_tensors(config: LMMConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors under their Hugging Face names, one at a time.

    Args:
        config: the model.
        params: its parameters.

    Yields:
        Name and array.
    """
    family = FAMILIES[config.family]
    layers = {tower: stack.layers for tower, stack in stacks(config).items()}
    for entry in family.table(config):
        parts = [np.asarray(_lookup(params, path)) for path in entry.paths]
        for name, row in entry.tensors(layers):
            yield name, np.ascontiguousarray(_to_file(entry, parts if row < 0 else [part[row] for part in parts]))
    if config.language.tied and config.language.encoder is not None and not config.language.scaled_head:
        # An unscaled T5 says tie_word_embeddings: false, so its head has to be in the file, tied or not.
        yield family.TIED_HEAD[0], np.asarray(_lookup(params, "language/tokens"))


def save_hf(
    config: LMMConfig,
    params: Params,
    directory: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a checkpoint that stock `transformers` loads; the directory appears whole or not at all.

    Args:
        config: a model of a shape that its family serves.
        params: its parameters; each tensor keeps its dtype.
        directory: where to; must not exist yet.
        like: checkpoint directory whose other config fields, generation config, tokenizer and processor are carried
            over; None writes config and weights alone.
        max_shard_size: above it the weights are split into shards with an index.

    Raises:
        AntgmmError: the shape cannot be served, the directory exists, or the disk is full.
    """
    directory = Path(directory)
    broken = violations(config)
    if broken:
        raise AntgmmError(f"transformers cannot serve this shape: {'; '.join(broken)}")
    if directory.exists():
        raise AntgmmError(f"{directory} exists: choose another name or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_weights(dict(hf_tensors(config, params)), temporary, max_shard_size)
        _write_config(config, params, temporary, None if like is None else Path(like))
        temporary.chmod(0o755)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise AntgmmError(
            f"{directory} could not be written ({error}): free disk space or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(tensors: dict[str, np.ndarray], directory: Path, max_shard_size: str) -> None:
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors writes for the owner alone; a server may be another user
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(config: LMMConfig, params: Params, directory: Path, like: Path | None) -> None:
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    base = {} if like is None else _read_json(like / CONFIG)
    for old in ("torch_dtype", "transformers_version"):
        base.pop(old, None)
    fields = _merge(base, {**FAMILIES[config.family].to_hf(config), "dtype": dtype})
    (directory / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if like is not None:
        for path in sorted(like.iterdir()):
            if path.is_file() and path.name not in (CONFIG, INDEX) and path.suffix not in _WEIGHT_SUFFIXES:
                shutil.copyfile(path, directory / path.name)


_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `over`, nested."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
