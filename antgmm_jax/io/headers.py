"""Config and shapes of a checkpoint of the Hub, from the headers of its files: its weights are not downloaded."""

import json
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata

from antgmm_jax.config import LMMConfig
from antgmm_jax.io import hub
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import CONFIG
from antgmm_jax.io.tensors import INDEX, WEIGHTS, shards
from antgmm_jax.pure import Params


def describe(directory: str | os.PathLike) -> tuple[LMMConfig, Params]:
    """Returns the config of a Hugging Face checkpoint, and its parameters' shapes and dtypes.

    Of a name of the Hub whose weights are not in the cache, config.json and the headers are read: kilobytes of a model
    of many gigabytes. A stored head is then taken to equal the token table if config.json says so.

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
    index = snapshot / INDEX
    return all((snapshot / name).exists() for name in (shards(index) if index.exists() else [WEIGHTS]))


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
    for name, file in found.files_metadata.items():
        if Path(name).name == name:  # `open_hf` refuses an index with other names
            _write(folder / name, file)


def _write(path: Path, file: SafetensorsFileMetadata) -> None:
    fields = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in file.tensors.items()
    }
    header = json.dumps(fields).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(out.tell() + max((tensor.data_offsets[1] for tensor in file.tensors.values()), default=0))
