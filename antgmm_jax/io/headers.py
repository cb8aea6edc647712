"""Config and shapes of a checkpoint of the Hub, from the headers of its files: its weights are not downloaded."""

import json
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, build_hf_headers, get_session, hf_raise_for_status

from antgmm_jax.config import LMMConfig
from antgmm_jax.families import family_of
from antgmm_jax.io import hub
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import CONFIG, read_config
from antgmm_jax.io.tensors import INDEX, renamed, weight_files
from antgmm_jax.pure import Params

COMPARED = 4096
"""Bytes of a stored head, and of the token table, that are downloaded: a head of its own differs in its first row."""


def describe(directory: str | os.PathLike) -> tuple[LMMConfig, Params]:
    """Returns the config of a Hugging Face checkpoint, and its parameters' shapes and dtypes.

    Of a name of the Hub whose weights are not in the cache, config.json and the headers are read: kilobytes of a model
    of many gigabytes. A stored head is then taken to equal the token table if the first bytes of both are equal.

    Args:
        directory: as in `load_hf`.

    Returns:
        Model config, and a tree like the parameters; each leaf is a `jax.ShapeDtypeStruct` in the dtype of the file.

    Raises:
        AntgmmError: as in `open_hf`, or the files cannot be downloaded.
    """
    repository = hub.parse(directory)
    if repository is None or repository.path or hub.offline():
        return _described(directory)
    snapshot = hub.config_of(repository)
    if _has_weights(snapshot):
        return _described(snapshot)
    with TemporaryDirectory(prefix="antgmm-") as temporary:
        folder = Path(temporary) / repository.id.partition("/")[2]
        folder.mkdir()
        _download(repository, snapshot, folder)
        return _described(folder)


def _described(directory: str | os.PathLike) -> tuple[LMMConfig, Params]:
    config, params = open_hf(directory)
    return config, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _has_weights(snapshot: Path) -> bool:
    return all((snapshot / name).exists() for name in weight_files(snapshot))


def _download(repository: hub.Repository, snapshot: Path, folder: Path) -> None:
    """Writes config.json, the index, and files of weights that consist of a header and a hole, which takes no disk."""
    (folder / CONFIG).write_bytes((snapshot / CONFIG).read_bytes())
    with hub.reading(repository, "model", hub.MODEL):
        api = HfApi(os.environ.get(hub.ENDPOINT))
        try:
            found = api.get_safetensors_metadata(repository.id, revision=snapshot.name, timeout=hub.SILENCE)
        except NotASafetensorsRepoError:
            raise hub.without_safetensors(repository) from None
    if found.sharded:
        (folder / INDEX).write_text(json.dumps({"weight_map": found.weight_map}))
    files = family_of(str(read_config(folder).get("model_type"))).files
    new = {name: renamed(name, files.renames) for file in found.files_metadata.values() for name in file.tensors}
    compared = {files.head, *files.tokens} if files.head in new.values() else set()
    for name, file in found.files_metadata.items():
        if Path(name).name == name:  # `open_hf` refuses an index with other names
            _write(folder / name, file)
            for tensor in file.tensors:
                if new[tensor] in compared:
                    _fill(folder / name, file.tensors[tensor].data_offsets, repository, snapshot.name)


def _fill(path: Path, offsets: tuple[int, int], repository: hub.Repository, commit: str) -> None:
    """Writes the first bytes of a tensor into the hole."""
    first, last = offsets
    with hub.reading(repository, "model", hub.MODEL):
        url = hf_hub_url(repository.id, path.name, revision=commit, endpoint=os.environ.get(hub.ENDPOINT))
        begin = _data(_part(url, 0, 8)) + first
        values = _part(url, begin, min(begin + COMPARED, begin + last - first))
    with path.open("r+b") as out:
        out.seek(_data(out.read(8)) + first)
        out.write(values)


def _data(length: bytes) -> int:
    """Start of the tensors in a file, from its first 8 bytes, which are the length of the header."""
    return 8 + struct.unpack("<Q", length)[0]


def _part(url: str, begin: int, end: int) -> bytes:
    """Downloads a part of a file."""
    headers = {**build_hf_headers(), "range": f"bytes={begin}-{end - 1}"}
    response = get_session().get(url, headers=headers, timeout=hub.SILENCE)
    hf_raise_for_status(response)
    return response.content[: end - begin]


def _write(path: Path, file: SafetensorsFileMetadata) -> None:
    fields = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in file.tensors.items()
    }
    header = json.dumps(fields).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(out.tell() + max((tensor.data_offsets[1] for tensor in file.tensors.values()), default=0))
